"""Which file implements a ``model_type`` (which GGUF calls the architecture), written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from cortex.models import llama


@dataclass(frozen=True, slots=True)
class Architecture:
    """What loading needs to know of an architecture's file."""

    config: Callable[[Mapping[str, Any]], Any]  # its Config.from_json
    model: Callable[..., nn.Module]  # called with the config and the activations' dtype
    fused: Mapping[str, tuple[str, ...]]
    gguf_paired: tuple[str, ...]


ARCHITECTURES = {
    "llama": Architecture(llama.LlamaConfig.from_json, llama.Llama, llama.FUSED, llama.GGUF_PAIRED),
}
