"""Which file implements a ``model_type`` (which GGUF calls the architecture), written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cortex.models import llama, qwen2, qwen3
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


ARCHITECTURES = {
    "llama": Architecture(llama.LlamaConfig.from_json, llama.Llama, llama.FUSED, llama.GGUF_PAIRED),
    "mistral": Architecture(_mistral_config, llama.Llama, llama.FUSED, llama.GGUF_PAIRED),
    "qwen2": Architecture(qwen2.Qwen2Config.from_json, qwen2.Qwen2, qwen2.FUSED, qwen2.GGUF_PAIRED),
    "qwen3": Architecture(qwen3.Qwen3Config.from_json, qwen3.Qwen3, qwen3.FUSED, qwen3.GGUF_PAIRED),
}
