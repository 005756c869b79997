"""What a checkpoint says of its own quantisation (``quantization_config`` of config.json).

Of the many ways that are about, one is read: weights of 8-bit floats (e4m3) with a scale for each
128 x 128 of them, as Qwen3's and DeepSeek's FP8 checkpoints have them. Their scales are tensors
beside the weights; activations, which they would have quantised as well, keep their width here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cortex.models.checkpoints.errors import CheckpointError, shown

FP8_TENSOR = "F8_E4M3"
BLOCK = 128  # rows and columns that share a scale

FP8_ONLY = {
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", None),
}
"""Keys that make another format of it, and the values implemented here."""


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether it has weights of 8-bit floats; raises CheckpointError for any other quantisation."""
    said = config.get("quantization_config")
    if said is None:
        return False
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if not isinstance(said, Mapping) or method != "fp8":
        raise CheckpointError(
            f"is quantised by {shown(method)}, which is not supported; supported: GGUF files, and "
            "safetensors that are dense or fp8 in blocks of 128 x 128"
        )
    for name, values in FP8_ONLY.items():
        if said.get(name) not in values:
            raise CheckpointError(f"is fp8 with {name} = {shown(said.get(name))}, not {values[0]}")
    return True
