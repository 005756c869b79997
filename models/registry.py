"""Which file implements a ``model_type`` (which GGUF calls the architecture), written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cortex.models import llama, qwen2, qwen3, qwen3_5, qwen3_5_moe, qwen3_moe, qwen3_next
from cortex.models.layers import Decoder


@dataclass(frozen=True, slots=True)
class Architecture:
    """What loading needs to know of an architecture's file."""

    config: Callable[[Mapping[str, Any]], Any]  # its Config.from_json
    model: Callable[..., Decoder]  # called with the config and the activations' dtype
    fused: Mapping[str, tuple[str, ...]]
    gguf_paired: tuple[str, ...]


def _mistral_config(raw: Mapping[str, Any]) -> llama.LlamaConfig:
    """Read Mistral as llama, which it is unless its window slides; silence means that it does."""
    return llama.LlamaConfig.from_json({"sliding_window": 4096, **raw})


QWEN3_5 = Architecture(
    qwen3_5.Qwen35Config.from_json, qwen3_5.Qwen35, qwen3_5.FUSED, qwen3_5.GGUF_PAIRED
)
QWEN3_5_MOE = Architecture(
    qwen3_5_moe.Qwen35MoeConfig.from_json,
    qwen3_5_moe.Qwen35Moe,
    qwen3_5_moe.FUSED,
    qwen3_5_moe.GGUF_PAIRED,
)
QWEN3_NEXT = Architecture(
    qwen3_next.Qwen3NextConfig.from_json,
    qwen3_next.Qwen3Next,
    qwen3_next.FUSED,
    qwen3_next.GGUF_PAIRED,
)

ARCHITECTURES = {
    "llama": Architecture(llama.LlamaConfig.from_json, llama.Llama, llama.FUSED, llama.GGUF_PAIRED),
    "mistral": Architecture(_mistral_config, llama.Llama, llama.FUSED, llama.GGUF_PAIRED),
    "qwen2": Architecture(qwen2.Qwen2Config.from_json, qwen2.Qwen2, qwen2.FUSED, qwen2.GGUF_PAIRED),
    "qwen3": Architecture(qwen3.Qwen3Config.from_json, qwen3.Qwen3, qwen3.FUSED, qwen3.GGUF_PAIRED),
    "qwen3_moe": Architecture(
        qwen3_moe.Qwen3MoeConfig.from_json,
        qwen3_moe.Qwen3Moe,
        qwen3_moe.FUSED,
        qwen3_moe.GGUF_PAIRED,
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen35"), QWEN3_5),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen35moe"), QWEN3_5_MOE),
    "qwen3_next": QWEN3_NEXT,
    "qwen3next": replace(QWEN3_NEXT, fused=qwen3_next.GGUF_FUSED),
}
