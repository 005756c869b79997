"""What one rank of a tensor-parallel group holds of a checkpoint, from its headers alone.

The last word of a parameter's name says how ranks share it, as ``models.linear`` does with it:

    split         parameters
    by rows       q_proj, gate_proj, up_proj, gate_up_proj; of a Gated DeltaNet in_proj_*, conv1d,
                  A_log, dt_bias
    by KV heads   k_proj, v_proj: a head where there are fewer of them than ranks
    by columns    o_proj, down_proj, out_proj
    vocabulary    embed_tokens, lm_head: by rows where these divide, else whole
    whole         norms, routers, gates of shared experts

Vectors are float32 in memory. A matrix stays as it is stored, but for dense ones on a device that
computes in 16 bits, for 8-bit floats, and for what is quantised while it is loaded
(``models.filler``). Equal on every rank, so the rank is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.names import is_derived, parameter_name
from cortex.models.checkpoints.quantized import FP8_TENSOR
from cortex.models.checkpoints.sizes import num_key_value_heads
from cortex.models.checkpoints.tensors import (
    FP8,
    GGUF_TYPES,
    QUANTS,
    SAFETENSORS_TYPES,
    StoredType,
    TensorInfo,
)

Split = Literal["rows", "kv_heads", "columns", "vocabulary", "whole"]

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("q_proj", "gate_proj", "up_proj", "gate_up_proj"), "rows"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_qkvz"), "rows"),
    **dict.fromkeys(("in_proj_a", "in_proj_b", "in_proj_ba"), "rows"),
    **dict.fromkeys(("conv1d", "A_log", "dt_bias"), "rows"),
    **dict.fromkeys(("k_proj", "v_proj"), "kv_heads"),
    **dict.fromkeys(("o_proj", "down_proj", "out_proj"), "columns"),
    **dict.fromkeys(("embed_tokens", "lm_head"), "vocabulary"),
}

DIVIDED = {
    "num_attention_heads": "query heads",
    "intermediate_size": "inner elements of the MLP",
    "moe_intermediate_size": "inner elements of an expert",
    "shared_expert_intermediate_size": "inner elements of the shared expert",
    "linear_num_key_heads": "key heads of the delta rule",
}
"""What a configuration has to have a multiple of the ranks of, where it has it."""

KINDS = ("weight", "bias", "weight_scale_inv")
SMALL = ("conv1d", "A_log", "dt_bias")
VECTOR_BYTES = 4
STORED = {
    stored.name: stored for stored in (*GGUF_TYPES.values(), *SAFETENSORS_TYPES.values(), FP8)
}
DENSE = ("F32", "F16", "BF16")


class Indivisible(ValueError):
    """*size* of *what* cannot be shared by *ranks*."""

    def __init__(self, what: str, size: int, ranks: int) -> None:
        super().__init__(f"{size} {what} do not divide among {ranks} ranks")
        self.size = size
        self.ranks = ranks


@dataclass(frozen=True, slots=True)
class Sharing:
    """How weights lie in memory: of so many *ranks*, quantised on the way, in which width."""

    ranks: int = 1
    quant: str | None = None
    """One of ``QUANTS``."""
    is_wide: bool = True
    """Whether dense weights stay as they are; else they take 16 bits."""


def split_of(parameter: str) -> Split:
    """Return how ranks share a parameter, by our name of it."""
    return SPLITS.get(_word(parameter), "whole")


def check_divides(config: Mapping[str, Any], ranks: int) -> None:
    """Raise Indivisible where *ranks* cannot share a model of *config*."""
    for name, what in DIVIDED.items():
        size = config.get(name)
        is_of_model = name != "intermediate_size" or "moe_intermediate_size" not in config
        if is_of_model and type(size) is int and size % ranks:
            raise Indivisible(what, size, ranks)
    heads = num_key_value_heads(config)
    if heads % ranks and ranks % heads:
        raise Indivisible("key-value heads", heads, ranks)


def kv_heads_of_rank(config: Mapping[str, Any], ranks: int) -> int:
    """Return how many key-value heads a rank has: at least one, which others may have too."""
    return max(1, num_key_value_heads(config) // ranks)


def weights_of_rank(checkpoint: Checkpoint, sharing: Sharing) -> int:
    """Return the bytes of a rank's weights; raise Indivisible or CheckpointError.

    A tensor that no architecture has a place for counts as if every rank held it.
    """
    check_divides(checkpoint.config, sharing.ranks)
    found = {
        parameter_name(name, checkpoint.format): tensor
        for name, tensor in checkpoint.tensors.items()
        if not is_derived(name)
    }
    if checkpoint.config.get("tie_word_embeddings") is True:
        found.pop("lm_head.weight", None)
    kv_heads = num_key_value_heads(checkpoint.config)
    return sum(_bytes(name, tensor, kv_heads, sharing) for name, tensor in found.items())


def _bytes(name: str, tensor: TensorInfo, kv_heads: int, sharing: Sharing) -> int:
    shape = tensor.shape or (1,)
    if name.endswith(".weight_scale_inv"):  # goes into the blocks of the weight
        return 0
    if len(shape) == 1 or _word(name) in SMALL:
        rows = _rows(name, shape[0], kv_heads, sharing.ranks)
        return rows * prod(shape[1:]) * VECTOR_BYTES
    *experts, rows, columns = shape
    if split_of(name) == "columns":
        columns = _columns(name, tensor.type, columns, sharing.ranks)
    else:
        rows = _rows(name, rows, kv_heads, sharing.ranks)
    stored = _stored(name, tensor.type, columns, sharing)
    return prod(experts) * rows * (columns // stored.block_elements) * stored.block_bytes


def _rows(name: str, rows: int, kv_heads: int, ranks: int) -> int:
    match split_of(name):
        case "rows":
            return _divided(f"rows of {name}", rows, ranks)
        case "kv_heads":
            return rows // kv_heads * max(1, kv_heads // ranks)
        case "vocabulary" if rows % ranks == 0:
            return rows // ranks
        case _:
            return rows


def _columns(name: str, kind: str, columns: int, ranks: int) -> int:
    """Return a rank's part of *columns*, which has to be of whole blocks."""
    block = (FP8 if kind == FP8_TENSOR else STORED[kind]).block_elements
    what = f"columns of {name}" if block == 1 else f"blocks of {block} columns of {name}"
    return _divided(what, columns // block, ranks) * block


def _divided(what: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise Indivisible(what, size, ranks)
    return size // ranks


def _stored(name: str, kind: str, columns: int, sharing: Sharing) -> StoredType:
    """Return as what rows of *columns* elements lie in memory."""
    if kind == FP8_TENSOR:
        return FP8
    if kind not in DENSE:
        return STORED[kind]
    if sharing.quant is not None and _may_quantise(name):
        becomes = STORED[QUANTS[sharing.quant]]
        if columns % becomes.block_elements == 0:
            return becomes
    return STORED[kind if sharing.is_wide else "BF16"]


def _may_quantise(name: str) -> bool:
    return split_of(name) != "whole" and _word(name) != "embed_tokens"


def _word(name: str) -> str:
    """Return the last word of a parameter's name that says what it is."""
    *words, last = name.split(".")
    return words[-1] if words and last in KINDS else last
