"""Where ranks cut the inner dimension of an MLP or an expert: between blocks, unevenly if need be.

The rows of the way down are runs of blocks that no rank can have a half of, and there may be fewer
of them than divide evenly: an expert of 768 in Q4_K is 3 blocks of 256, of which the first of two
ranks gets 2. The rows of gate and up are cut at the same places.

    blocks          ranks   of each rank
    divide evenly   any     as many
    74 of 256       4       19, 19, 18, 18
    3 of 256        4       an even part of the elements, as of a size that is no number of blocks:
                            what is stored in such blocks is refused, what is not stays dense
"""

from __future__ import annotations

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.names import parameter_name
from cortex.models.checkpoints.quantized import FP8_TENSOR
from cortex.models.checkpoints.tensors import (
    FP8,
    GGUF_TYPES,
    QUANTS,
    SAFETENSORS_TYPES,
    StoredType,
)

STORED = {
    stored.name: stored for stored in (*GGUF_TYPES.values(), *SAFETENSORS_TYPES.values(), FP8)
}
DENSE = ("F32", "F16", "BF16")


def inner_block(checkpoint: Checkpoint, quant: str | None = None) -> int:
    """Return how many elements of an inner dimension stay together, with *quant* of ``QUANTS``.

    It is the largest block of what leads back from one, as that is stored or becomes.
    """
    kinds = {
        tensor.type
        for name, tensor in checkpoint.tensors.items()
        if parameter_name(name, checkpoint.format).removesuffix(".weight").endswith("down_proj")
    }
    return max((_becomes(kind, quant).block_elements for kind in kinds), default=1)


def inner_range(size: int, block: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return [first, end) of *size* inner elements that *rank* holds; the first ranks hold most.

    Raise ValueError where ranks can share neither blocks nor elements.
    """
    unit = block if size % block == 0 and size // block >= ranks else 1
    each, more = divmod(size // unit, ranks)
    if more and unit == 1:
        raise ValueError(f"{size} does not divide among {ranks} ranks")
    first = rank * each + min(rank, more)
    return first * unit, (first + each + (rank < more)) * unit


def _becomes(kind: str, quant: str | None) -> StoredType:
    if kind == FP8_TENSOR:
        return FP8
    return STORED[QUANTS[quant] if quant and kind in DENSE else kind]
