"""What packed rows hold, for Triton kernels: codes, and the scales that make weights of them.

A row is seen as runs of sixteen elements, none of which crosses a scale of any type. Its codes are
chunks of sixteen bytes (``planes``), each of which holds a part of RUNS runs: with codes of 4 bits
the low halves are a run and the high halves another, SPACING runs behind it.

    type                             codes   RUNS  SPACING   high bits  scales
    Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL/XS    4 bits  2     1         of Q5      a block's
    Q4_K Q5_K                        4       2     2         of Q5_K    6 bits of 12 bytes
    Q6_K                             4       2     4         2 bits     a byte
    Q2_K Q3_K                        2       4     2         of Q3_K    4 bits, 6 bits of 12 bytes
    Q8_0 FP8                         8       1     1                    a block's
    dense                            itself  1     1

So everything a kernel needs of a type is a function of the chunk and of the run. N are outputs, C
chunks; a tile of weights is [N, C, 16]. ``constants`` are what a kernel is compiled for.

Codes become floats without the conversion unit, which is slow: 2**23 + code is the code in the last
bits of a float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cortex.models.quantization import DENSE, STORED, Part

RUN = 16
"""Elements of a run, and bytes of a chunk."""


@dataclass(frozen=True, slots=True)
class Format:
    """Where and how a type's codes, high bits and scales lie.

    *zero* is what a code is less than; *_at* are the bytes of a block's earlier planes.
    """

    CODES: str = "bits"
    RUNS: int = 2
    SPACING: int = 1
    ZERO: int = 0
    HIGH: str = "none"
    HIGH_AT: int = 0
    SCALES: str = "half"
    SCALES_AT: int = 16


FORMATS = {
    "Q4_0": Format(ZERO=8),
    "Q4_1": Format(SCALES="pair"),
    "Q5_0": Format(ZERO=16, HIGH="word", HIGH_AT=16, SCALES_AT=20),
    "Q5_1": Format(HIGH="word", HIGH_AT=16, SCALES="pair", SCALES_AT=20),
    "Q8_0": Format(CODES="signed", RUNS=1, ZERO=128, SCALES_AT=32),
    "IQ4_NL": Format(CODES="curve"),
    "Q2_K": Format(RUNS=4, SPACING=2, SCALES="nibbles", SCALES_AT=64),
    "Q3_K": Format(
        RUNS=4, SPACING=2, ZERO=4, HIGH="bit", HIGH_AT=64, SCALES="centred", SCALES_AT=96
    ),
    "Q4_K": Format(SPACING=2, SCALES="sixes", SCALES_AT=128),
    "Q5_K": Format(SPACING=2, HIGH="bit", HIGH_AT=128, SCALES="sixes", SCALES_AT=160),
    "Q6_K": Format(SPACING=4, ZERO=32, HIGH="two", HIGH_AT=128, SCALES="bytes", SCALES_AT=192),
    "IQ4_XS": Format(CODES="curve", SCALES="spread", SCALES_AT=128),
    "FP8": Format(CODES="e4m3", RUNS=1, SCALES="single", SCALES_AT=128),
    "dense": Format(CODES="dense", RUNS=1, SCALES="none"),
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A part as a kernel is given it.

    *data* are its bytes, or its elements where it is dense; *scales* the same memory as numbers
    of the width of a scale. A row is so many units of *data* long, so many chunks, and so many
    whole blocks of the type.
    """

    data: Tensor
    scales: Tensor
    row_units: int
    chunks: int
    blocks: int
    format: Format

    @classmethod
    def of(cls, part: Part) -> Packed:
        """Return what a kernel is given of *part*, dense or planar."""
        if part.kind in DENSE:
            data = part.data.view(DENSE[part.kind])
            return cls(data, data, data.size(1), data.size(1) // RUN, 0, FORMATS["dense"])
        assert part.is_planar, "kernels read planar rows"
        shape = FORMATS[part.kind]
        scales = part.data.view(torch.float32 if shape.SCALES == "single" else torch.float16)
        chunks = part.columns // RUN // shape.RUNS
        blocks = part.data.size(1) // STORED[part.kind].block_bytes
        return cls(part.data, scales, part.data.size(1), chunks, blocks, shape)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What kernels take by place: data, scales, row_units, blocks."""
        return self.data, self.scales, self.row_units, self.blocks

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels take by name."""
        return asdict(self.format)


def serves(part: Part) -> bool:
    """Whether kernels can read *part*."""
    return part.is_planar or (part.kind in DENSE and part.columns % RUN == 0)


@triton.jit
def run_of(chunk, RUNS: tl.constexpr, SPACING: tl.constexpr, PLACE: tl.constexpr):
    """Return which run of its row the PLACE-th lowest bits of *chunk* belong to."""
    return (chunk // SPACING) * (SPACING * RUNS) + SPACING * PLACE + chunk % SPACING


@triton.jit
def load_chunks(data, row, chunk, mask, row_units, CODES: tl.constexpr):
    """Rows [N] int64 and chunks [C] -> their bytes [N, C, 16] int32; dense, elements float32."""
    at = (row * row_units)[:, None, None] + (chunk * 16)[None, :, None]
    found = tl.load(data + at + tl.arange(0, 16)[None, None, :], mask=mask[:, :, None], other=0)
    if CODES == "dense":
        return found.to(tl.float32)
    else:
        return found.to(tl.int32)


@triton.jit
def load_high(
    data,
    row,
    chunk,
    mask,
    row_units,
    blocks,
    RUNS: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
):
    """Return the bytes [N, C, 16] in which the high bits of a chunk's elements are; else zero."""
    if HIGH == "bit" or HIGH == "two":
        SHARING: tl.constexpr = 16 // RUNS if HIGH == "bit" else 4  # chunks with the same bytes
        place = blocks * HIGH_AT + chunk // SHARING * 32 + chunk % 2 * 16
        at = (row * row_units)[:, None, None] + place[None, :, None]
        found = tl.load(data + at + tl.arange(0, 16)[None, None, :], mask=mask[:, :, None], other=0)
        return found.to(tl.int32)
    else:
        return 0


@triton.jit
def codes_of(
    data,
    found,
    high,
    row,
    chunk,
    run,
    mask,
    row_units,
    blocks,
    PLACE: tl.constexpr,
    CODES: tl.constexpr,
    RUNS: tl.constexpr,
    ZERO: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
):
    """Return the codes of one run of each chunk, float32 [N, C, 16], less ZERO."""
    BITS: tl.constexpr = 8 // RUNS
    if CODES == "dense":
        return found
    elif CODES == "e4m3":
        # A float16 has the same fields with more room; its exponent begins 8 lower.
        bits = (found & 0x80) << 8 | (found & 0x7F) << 7
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif CODES == "curve":
        return _on_curve((found >> (PLACE * BITS)) & 15)
    else:
        code = (found >> (PLACE * BITS)) & ((1 << BITS) - 1)
        if CODES == "signed":
            code = code ^ 0x80
        if HIGH == "word":
            at = data + (row * row_units)[:, None] + (blocks * HIGH_AT + run * 2)[None, :]
            word = tl.load(at, mask=mask, other=0).to(tl.int32)
            word = word | tl.load(at + 1, mask=mask, other=0).to(tl.int32) << 8
            code = code | (word[:, :, None] >> tl.arange(0, 16)[None, None, :] & 1) << BITS
        elif HIGH == "bit":
            code = code | (high >> (run % 16 // 2)[None, :, None] & 1) << BITS
        elif HIGH == "two":
            shift = 4 * PLACE + chunk % 4 // 2 * 2
            code = code | (high >> shift[None, :, None] & 3) << BITS
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def _on_curve(code):
    """``quantization.CURVE`` [code], of four words of four signed bytes."""
    is_odd = (code & 4) != 0
    low = tl.where(is_odd, -0x09152231, -0x4052677F)
    high = tl.where(is_odd, 0x71594535, 0x26190D01)
    word = tl.where((code & 8) != 0, high, low)
    return (word << (24 - (code & 3) * 8) >> 24).to(tl.float32)


@triton.jit
def load_scales(
    data,
    scales,
    row,
    run,
    mask,
    row_units,
    blocks,
    SCALES: tl.constexpr,
    SCALES_AT: tl.constexpr,
):
    """Return what codes of a run are multiplied with and what is added, float32 [N, C] each."""
    byte_at = (row * row_units)[:, None]
    WIDTH: tl.constexpr = 4 if SCALES == "single" else 2
    at = scales + (row * (row_units // WIDTH))[:, None]
    if SCALES == "half":
        place = blocks * (SCALES_AT // 2) + run // 2
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        return scale, tl.zeros_like(scale)
    elif SCALES == "single":
        place = blocks * (SCALES_AT // 4) + run // 8
        scale = tl.load(at + place[None, :], mask=mask, other=0.0)
        return scale, tl.zeros_like(scale)
    elif SCALES == "pair":
        place = blocks * (SCALES_AT // 2) + run // 2 * 2
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        least = tl.load(at + 1 + place[None, :], mask=mask, other=0.0).to(tl.float32)
        return scale, least
    elif SCALES == "nibbles":
        place = blocks * (SCALES_AT // 2 + 8) + run // 16 * 2
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        least = tl.load(at + 1 + place[None, :], mask=mask, other=0.0).to(tl.float32)
        both = _load_byte(data + byte_at, blocks * SCALES_AT + run, mask)
        return scale * (both & 15).to(tl.float32), -least * (both >> 4).to(tl.float32)
    elif SCALES == "bytes":
        place = blocks * (SCALES_AT // 2 + 8) + run // 16
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        byte = _load_byte(data + byte_at, blocks * SCALES_AT + run, mask)
        scale = scale * ((byte ^ 0x80) - 0x80).to(tl.float32)
        return scale, tl.zeros_like(scale)
    elif SCALES == "centred":
        place = blocks * (SCALES_AT // 2 + 6) + run // 16
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        first = blocks * SCALES_AT + run // 16 * 12
        which = run % 16
        low = _load_byte(data + byte_at, first + which % 8, mask)
        low = (low >> (which // 8 * 4)[None, :]) & 15
        high = _load_byte(data + byte_at, first + 8 + which % 4, mask)
        high = (high >> (which // 4 * 2)[None, :]) & 3
        scale = scale * ((low | high << 4) - 32).to(tl.float32)
        return scale, tl.zeros_like(scale)
    elif SCALES == "sixes":
        place = blocks * (SCALES_AT // 2 + 6) + run // 16 * 2
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        least = tl.load(at + 1 + place[None, :], mask=mask, other=0.0).to(tl.float32)
        which = run % 16 // 2
        from_byte = blocks * SCALES_AT + run // 16 * 12 + which % 4
        first = _load_byte(data + byte_at, from_byte, mask)
        second = _load_byte(data + byte_at, from_byte + 4, mask)
        third = _load_byte(data + byte_at, from_byte + 8, mask)
        is_early = (which < 4)[None, :]
        step = tl.where(is_early, first & 63, third & 15 | (first >> 2) & 48)
        base = tl.where(is_early, second & 63, third >> 4 | (second >> 2) & 48)
        return scale * step.to(tl.float32), -least * base.to(tl.float32)
    elif SCALES == "spread":
        place = blocks * (SCALES_AT // 2 + 2) + run // 16 * 2
        scale = tl.load(at + place[None, :], mask=mask, other=0.0).to(tl.float32)
        which = run % 16 // 2
        low = _load_byte(data + byte_at, blocks * SCALES_AT + run // 16 * 4 + which // 2, mask)
        low = (low >> (which % 2 * 4)[None, :]) & 15
        from_byte = blocks * (SCALES_AT + 4) + run // 16 * 4 + 2 + which // 4
        high = _load_byte(data + byte_at, from_byte, mask)
        high = (high >> (which % 4 * 2)[None, :]) & 3
        scale = scale * ((low | high << 4) - 32).to(tl.float32)
        return scale, tl.zeros_like(scale)
    else:
        ones = tl.where(mask, 1.0, 0.0)
        return ones, tl.zeros_like(ones)


@triton.jit
def _load_byte(at, place, mask):
    return tl.load(at + place[None, :], mask=mask, other=0).to(tl.int32)
