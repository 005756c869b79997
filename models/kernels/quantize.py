"""Floats to stored blocks, while a dense checkpoint loads: each matrix once, row by row.

The scale of a block follows from its largest number; codes are rounded to the nearest one, as
llama.cpp's quantize_row_*_ref do, bit for bit (half a step away from zero for Q8_0). A block of
zeros, or of numbers too small for a scale, becomes zeros. FP8 takes the scale that puts the largest
number at 448, the largest float of 8 bits. On a CPU the C kernels do the same sooner.

IQ4_NL, whose steps differ, is for comparisons: no checkpoint is quantised to it on load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cortex.models.kernels import cpu
from cortex.models.quantization import CURVE, STORED, row_bytes

AT_ONCE = 1 << 22
"""Elements quantised at once: their intermediate floats stay tens of MiB."""

IN_TORCH = ("IQ4_NL",)
"""Types that only torch quantises to."""

FP8_MAX = 448.0
CURVE_TRIALS = range(-7, 8)
"""How far around the largest code of the curve a block's largest number is tried."""


def quantize(kind: str, weights: Tensor) -> Tensor:
    """Quantise floats [M, K] of any width to *kind*, uint8 [M, bytes of a row], on their device.

    Raises ValueError where K is no whole number of blocks.
    """
    size = STORED[kind].block_elements
    rows, columns = weights.shape
    if columns % size:
        raise ValueError(f"rows of {columns} are no whole number of {kind} blocks of {size}")
    packed = torch.empty(rows, row_bytes(kind, columns), dtype=torch.uint8, device=weights.device)
    if not rows:
        return packed
    fast = cpu.kernels() if weights.device.type == "cpu" and kind not in IN_TORCH else None
    if fast:
        fast.quantize(kind, weights, packed)
        return packed
    return by_torch(kind, weights, packed)


def by_torch(kind: str, weights: Tensor, packed: Tensor) -> Tensor:
    """Quantise floats [M, K] into *packed* on any device, what the C kernels are held to."""
    columns, size = weights.size(1), STORED[kind].block_elements
    at_once = max(1, AT_ONCE // max(1, columns))
    for piece, to in zip(*(torch.split(t, at_once) for t in (weights, packed)), strict=True):
        blocks = piece.float().reshape(-1, size)
        to.copy_(QUANTIZE[kind](blocks).view(to.shape))
    return packed


def _q4_0(blocks: Tensor) -> Tensor:
    scale, inverse = _signed_scale(blocks, 8)
    return torch.cat((_half(scale), _nibbles(_truncated(blocks * inverse + 8.5, 15))), dim=-1)


def _q4_1(blocks: Tensor) -> Tensor:
    least, scale, inverse = _range(blocks, 15)
    codes = _truncated((blocks - least) * inverse + 0.5, 15)
    return torch.cat((_half(scale), _half(least), _nibbles(codes)), dim=-1)


def _q5_0(blocks: Tensor) -> Tensor:
    scale, inverse = _signed_scale(blocks, 16)
    codes = _truncated(blocks * inverse + 16.5, 31)
    return torch.cat((_half(scale), _fifth_bits(codes), _nibbles(codes & 15)), dim=-1)


def _q5_1(blocks: Tensor) -> Tensor:
    least, scale, inverse = _range(blocks, 31)
    codes = _truncated((blocks - least) * inverse + 0.5, 31)
    fields = (_half(scale), _half(least), _fifth_bits(codes), _nibbles(codes & 15))
    return torch.cat(fields, dim=-1)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    size = scaled.abs()
    whole = size.floor()
    codes = (whole + (2 * (size - whole)).floor()) * scaled.sign()
    return torch.cat((_half(scale), codes.to(torch.int8).view(torch.uint8)), dim=-1)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """Of several scales the one with the least squared error, as llama.cpp tries them."""
    curve = torch.tensor(CURVE, dtype=torch.float32, device=blocks.device)
    borders = (curve[1:] + curve[:-1]) / 2
    most = _farthest(blocks)
    best = torch.full_like(most, torch.inf)
    scale, codes = torch.zeros_like(most), torch.zeros_like(blocks, dtype=torch.int64)
    for trial in CURVE_TRIALS:
        found = torch.bucketize(blocks * _inverse(most / (CURVE[0] + trial)), borders)
        values = curve[found]
        fitted = _least_squares(blocks, values).half().float()
        error = (blocks - fitted * values).square().sum(-1, keepdim=True)
        is_better = error < best
        best, scale = torch.where(is_better, error, best), torch.where(is_better, fitted, scale)
        codes = torch.where(is_better, found, codes)
    return torch.cat((_half(scale), _nibbles(codes.to(torch.uint8))), dim=-1)


def _fp8(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(-1, keepdim=True) / FP8_MAX
    codes = (blocks * _inverse(scale)).to(torch.float8_e4m3fn)
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), dim=-1)


def _signed_scale(blocks: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The scale that puts the number farthest from zero at minus *steps*, and its inverse."""
    scale = _farthest(blocks) / -steps
    return scale, _inverse(scale)


def _farthest(blocks: Tensor) -> Tensor:
    """The number farthest from zero, the first of such, with its sign: [.., 1]."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _range(blocks: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The least number, the scale that puts the largest at *steps* above it, and its inverse."""
    least, most = (end + 0.0 for end in blocks.aminmax(dim=-1, keepdim=True))  # no negative zero
    scale = (most - least) / steps
    return least, scale, _inverse(scale)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a scale of 0, and for one so small that its inverse is infinite."""
    inverse = 1.0 / scale
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _least_squares(blocks: Tensor, values: Tensor) -> Tensor:
    """The scale with which *values* come nearest to *blocks*."""
    return (blocks * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True)


def _truncated(codes: Tensor, most: int) -> Tensor:
    return codes.clamp(0, most).to(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """[blocks, 32] codes under 16 to [blocks, 16] bytes, the first half in the low ones."""
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def _fifth_bits(codes: Tensor) -> Tensor:
    """[blocks, 32] codes under 32 to the [blocks, 4] bytes of their fifth bits."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = (codes >> 4).reshape(-1, 4, 8) << places
    return bits.sum(-1, dtype=torch.uint8)


def _half(numbers: Tensor) -> Tensor:
    return numbers.half().view(torch.uint8)


QUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "FP8": _fp8,
}
"""Blocks float32 [B, elements] to uint8 [B, bytes of a block]."""
