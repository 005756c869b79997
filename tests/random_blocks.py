"""Blocks of random bytes with sane scales, of every stored type: what no library quantises to."""

from __future__ import annotations

import torch
from torch import Tensor

from cortex.models.kernels import reference
from cortex.models.quantization import DENSE, STORED, Part, row_bytes

HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
}
"""Where in a block its float16 fields are."""

PACKED = [kind for kind in STORED if kind not in DENSE]


def columns_of(kind: str, blocks: int) -> int:
    """Return the elements of so many blocks; of a dense type as many as of 32-blocks."""
    return blocks * max(32, STORED[kind].block_elements)


def random_part(kind: str, rows: int, columns: int, size: float = 0.25) -> Part:
    """Weights of about that *size*, positive and negative."""
    if kind in DENSE:
        return Part(kind, (torch.randn(rows, columns) * size).to(DENSE[kind]).view(torch.uint8))
    data = torch.randint(0, 256, (rows, row_bytes(kind, columns)), dtype=torch.uint8)
    blocks = data.view(rows, -1, STORED[kind].block_bytes)
    if kind == "FP8":
        codes = blocks[..., 4:]
        codes[(codes & 127) == 127] = 0  # no number
    scales = torch.randn(blocks.shape[:2])
    _scale(kind, blocks, scales)
    found = reference.dequantize(kind, data).square().mean().sqrt()
    _scale(kind, blocks, scales * (size / found))
    return Part(kind, data)


def _scale(kind: str, blocks: Tensor, scales: Tensor) -> None:
    """Set every scale, and minima of that size."""
    if kind == "FP8":
        blocks[..., :4] = scales[..., None].contiguous().view(torch.uint8)
        return
    for offset in HALVES[kind]:
        blocks[..., offset : offset + 2] = scales.half()[..., None].contiguous().view(torch.uint8)
        scales = scales.flip(1)
