"""What one rank of a tensor-parallel group holds of a checkpoint, from its headers alone.

The last word of a parameter's name says how ranks share it, as ``models.linear`` does with it:

    split         parameters
    by rows       q_proj; of a Gated DeltaNet in_proj_*, conv1d, A_log, dt_bias
    inner rows    gate_proj, up_proj, gate_up_proj: in whole blocks (``inner_blocks``)
    by KV heads   k_proj, v_proj: a head where there are fewer of them than ranks
    by columns    o_proj, out_proj
    inner columns down_proj: in whole blocks
    vocabulary    embed_tokens, lm_head: by rows where these divide, else whole
    whole         norms, routers, gates of shared experts

Vectors are float32 in memory. A matrix stays as it is stored, but for dense ones on a device that
computes in 16 bits, for 8-bit floats, and for what is quantised while it is loaded
(``models.filler``). Where inner dimensions are cut unevenly the first rank holds the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.inner_blocks import DENSE, STORED, inner_block, inner_range
from cortex.models.checkpoints.names import is_derived, parameter_name
from cortex.models.checkpoints.quantized import FP8_TENSOR
from cortex.models.checkpoints.sizes import num_key_value_heads
from cortex.models.checkpoints.tensors import FP8, QUANTS, StoredType, TensorInfo

Split = Literal["rows", "inner_rows", "kv_heads", "columns", "inner_columns", "vocabulary", "whole"]

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "inner_rows"),
    **dict.fromkeys(("q_proj", "in_proj_qkv", "in_proj_z", "in_proj_qkvz"), "rows"),
    **dict.fromkeys(("in_proj_a", "in_proj_b", "in_proj_ba"), "rows"),
    **dict.fromkeys(("conv1d", "A_log", "dt_bias"), "rows"),
    **dict.fromkeys(("k_proj", "v_proj"), "kv_heads"),
    **dict.fromkeys(("o_proj", "out_proj"), "columns"),
    "down_proj": "inner_columns",
    **dict.fromkeys(("embed_tokens", "lm_head"), "vocabulary"),
}

DIVIDED = {
    "num_attention_heads": "query heads",
    "intermediate_size": "inner elements of the MLP",
    "moe_intermediate_size": "inner elements of an expert",
    "shared_expert_intermediate_size": "inner elements of the shared expert",
    "linear_num_key_heads": "key heads of the delta rule",
}
"""What a configuration has to have a multiple of the ranks of, where it has it.

Of inner elements whole blocks may do instead.
"""

KINDS = ("weight", "bias", "weight_scale_inv")
SMALL = ("conv1d", "A_log", "dt_bias")
VECTOR_BYTES = 4


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
    rank: int = 0
    """Which of them: the first holds at least as much as any other."""


def split_of(parameter: str) -> Split:
    """Return how ranks share a parameter, by our name of it."""
    return SPLITS.get(_word(parameter), "whole")


def check_divides(config: Mapping[str, Any], ranks: int, block: int = 1) -> None:
    """Raise Indivisible where *ranks* cannot share a model of *config*, with inner *block*s."""
    for name, what in DIVIDED.items():
        size = config.get(name)
        is_of_model = name != "intermediate_size" or "moe_intermediate_size" not in config
        if is_of_model and type(size) is int:
            _part(what, size, Sharing(ranks), block if name.endswith("intermediate_size") else 1)
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
    block = inner_block(checkpoint, sharing.quant)
    check_divides(checkpoint.config, sharing.ranks, block)
    found = {
        parameter_name(name, checkpoint.format): tensor
        for name, tensor in checkpoint.tensors.items()
        if not is_derived(name)
    }
    if checkpoint.config.get("tie_word_embeddings") is True:
        found.pop("lm_head.weight", None)
    sizing = _Sizing(sharing, num_key_value_heads(checkpoint.config), block)
    return sum(sizing.bytes_of(name, tensor) for name, tensor in found.items())


@dataclass(frozen=True, slots=True)
class _Sizing:
    """What a rank holds of the tensors of one model."""

    sharing: Sharing
    kv_heads: int  # of the model
    block: int  # of its inner dimensions

    def bytes_of(self, name: str, tensor: TensorInfo) -> int:
        """Return the bytes of a rank's part of *tensor*, by our *name* of it."""
        shape = tensor.shape or (1,)
        if name.endswith(".weight_scale_inv"):  # goes into the blocks of the weight
            return 0
        if len(shape) == 1 or _word(name) in SMALL:
            return self._rows(name, shape[0]) * prod(shape[1:]) * VECTOR_BYTES
        *experts, rows, columns = shape
        rows, columns = self._rows(name, rows), self._columns(name, tensor.type, columns)
        stored = _stored(name, tensor.type, columns, self.sharing)
        return prod(experts) * rows * (columns // stored.block_elements) * stored.block_bytes

    def _rows(self, name: str, rows: int) -> int:
        ranks = self.sharing.ranks
        match split_of(name):
            case "rows":
                return _part(f"rows of {name}", rows, self.sharing)
            case "inner_rows":
                stacked = 2 if _word(name) == "gate_up_proj" else 1
                each = _part(f"rows of {name}", rows // stacked, self.sharing, self.block)
                return stacked * each
            case "kv_heads":
                return rows // self.kv_heads * max(1, self.kv_heads // ranks)
            case "vocabulary" if rows % ranks == 0:
                return rows // ranks
            case _:
                return rows

    def _columns(self, name: str, kind: str, columns: int) -> int:
        """Return a rank's part of *columns*, which has to be of whole blocks."""
        split = split_of(name)
        if split not in {"columns", "inner_columns"}:
            return columns
        block = (FP8 if kind == FP8_TENSOR else STORED[kind]).block_elements
        what = f"columns of {name}" if block == 1 else f"blocks of {block} columns of {name}"
        if split == "columns":
            return _part(what, columns // block, self.sharing) * block
        part = _part(f"columns of {name}", columns, self.sharing, self.block)
        if part % block:
            raise Indivisible(what, columns // block, self.sharing.ranks)
        return part


def _part(what: str, size: int, sharing: Sharing, block: int = 1) -> int:
    """Return how many of *size* the rank holds."""
    try:
        first, end = inner_range(size, block, sharing.rank, sharing.ranks)
    except ValueError as exc:
        raise Indivisible(what, size, sharing.ranks) from exc
    return end - first


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
