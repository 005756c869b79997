"""Products with quantised weights that read the packed rows only, in Triton; and rows unpacked.

What is best depends on the rows M of x, because a product of few rows waits for the weights, and
one of many for the arithmetic:

    M            kernel     what it does
    1            _vector    each thread multiplies whole runs in float32, scales their sums, and
                            adds up across threads once at the end
    2 to 255     _tiles     unpacks a tile of weights in registers for the tensor cores; where there
                            are few tiles, several programs share the columns and _add_up adds
    256 on       _unpack    writes some rows in the width of x, for torch's product; in float32,
                            for which there are no tensor cores, from 2 on

The sums are float32 in all of them. In ``_tiles`` and ``_unpack`` weights are rounded to the width
of x before they multiply, as the reference does.

Batch invariant it is always ``_tiles``, with a tile that follows from the weights' shape, and one
program for all the columns (``triton_linear`` says why).

No figure below was measured on a GPU; they follow from counting: an H200 has 132 processors, reads
about 34 codes of 4 bits per clock and processor, and can begin 128 instructions of one lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cortex.models.kernels.triton_packed import (
    Packed,
    codes_of,
    load_chunks,
    load_high,
    load_scales,
    run_of,
)
from cortex.models.quantization import Part

UNPACKED_FROM = 256
"""Rows from which a matrix is unpacked for torch's product: writing and reading 16 bits of every
weight then takes less than tiles would lose."""

SPLIT_UP_TO = 64
"""Rows up to which programs share columns; more rows make tiles enough."""

EVERY_WAY = (1, 2, 17, SPLIT_UP_TO + 1, UNPACKED_FROM)
"""Numbers of rows of which each is multiplied in another way."""

PROGRAMS = 264
"""Programs that keep a large device busy: two for each processor of an H200."""

UNPACKED_ELEMENTS = 1 << 25
"""Weights unpacked at a time: 64 MiB in 16 bits."""

VECTOR_OUTPUTS = 2
VECTOR_CHUNKS = 64
"""Of a program that is one warp, so that its threads exchange layouts without barriers: two
chunks of a thread in two rows are enough under way to hide the memory."""

UNPACK_CHUNKS = 64


@triton.jit
def dot_runs(
    x,
    row,
    is_output,
    data,
    scales,
    row_units,
    blocks,
    chunks,
    TILE_CHUNKS: tl.constexpr,
    CODES: tl.constexpr,
    RUNS: tl.constexpr,
    SPACING: tl.constexpr,
    ZERO: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_AT: tl.constexpr,
):
    """One row at *x* times packed rows [N] -> [N] float32."""
    element = tl.arange(0, 16)[None, :]
    total = tl.zeros([row.shape[0], TILE_CHUNKS], tl.float32)
    for first in range(0, chunks, TILE_CHUNKS):
        chunk = first + tl.arange(0, TILE_CHUNKS)
        is_chunk = chunk < chunks
        mask = is_output[:, None] & is_chunk[None, :]
        found = load_chunks(data, row, chunk, mask, row_units, CODES)
        high = load_high(data, row, chunk, mask, row_units, blocks, RUNS, HIGH, HIGH_AT)
        for place in tl.static_range(RUNS):
            run = run_of(chunk, RUNS, SPACING, place)
            inputs = tl.load(x + run[:, None] * 16 + element, mask=is_chunk[:, None], other=0.0)
            inputs = inputs.to(tl.float32)
            code = codes_of(
                *(data, found, high, row, chunk, run, mask, row_units, blocks),
                *(place, CODES, RUNS, ZERO, HIGH, HIGH_AT),
            )
            scale, least = load_scales(
                data, scales, row, run, mask, row_units, blocks, SCALES, SCALES_AT
            )
            total += scale * tl.sum(code * inputs[None, :, :], 2)
            total += least * tl.sum(inputs, 1)[None, :]
    return tl.sum(total, 1)


@triton.jit
def multiply_tiles(
    x,
    x_at,
    is_row,
    row,
    is_output,
    data,
    scales,
    row_units,
    blocks,
    first_chunk,
    end_chunk,
    TILE_CHUNKS: tl.constexpr,
    CODES: tl.constexpr,
    RUNS: tl.constexpr,
    SPACING: tl.constexpr,
    ZERO: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_AT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows of x [M] at offsets *x_at* times packed rows [N], by some chunks -> [M, N] float32."""
    ROWS: tl.constexpr = row.shape[0]
    INPUTS: tl.constexpr = TILE_CHUNKS * 16
    column = tl.arange(0, INPUTS)
    total = tl.zeros([x_at.shape[0], ROWS], tl.float32)
    for first in range(first_chunk, end_chunk, TILE_CHUNKS):
        chunk = first + tl.arange(0, TILE_CHUNKS)
        mask = is_output[:, None] & (chunk < end_chunk)[None, :]
        found = load_chunks(data, row, chunk, mask, row_units, CODES)
        high = load_high(data, row, chunk, mask, row_units, blocks, RUNS, HIGH, HIGH_AT)
        chunk_of_column = first + column // 16
        is_column = chunk_of_column < end_chunk
        for place in tl.static_range(RUNS):
            run = run_of(chunk, RUNS, SPACING, place)
            code = codes_of(
                *(data, found, high, row, chunk, run, mask, row_units, blocks),
                *(place, CODES, RUNS, ZERO, HIGH, HIGH_AT),
            )
            scale, least = load_scales(
                data, scales, row, run, mask, row_units, blocks, SCALES, SCALES_AT
            )
            weights = code * scale[:, :, None] + least[:, :, None]
            weights = tl.reshape(weights.to(x.dtype.element_ty), [ROWS, INPUTS])
            run_of_column = run_of(chunk_of_column, RUNS, SPACING, place)
            inputs = tl.load(
                x + x_at[:, None] + (run_of_column * 16 + column % 16)[None, :],
                mask=is_row[:, None] & is_column[None, :],
                other=0.0,
            )
            if UPCAST:
                inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
            total += tl.dot(inputs, tl.trans(weights), input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["outputs", "blocks", "chunks"])
def _vector(
    x,
    y,
    data,
    scales,
    row_units,
    blocks,
    chunks,
    outputs,
    OUTPUTS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CODES: tl.constexpr,
    RUNS: tl.constexpr,
    SPACING: tl.constexpr,
    ZERO: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_AT: tl.constexpr,
):
    """Grid (tiles of outputs): one row of x."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < outputs
    total = dot_runs(
        *(x, output.to(tl.int64), is_output, data, scales, row_units, blocks, chunks),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
    )
    tl.store(y + output, total.to(y.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["rows", "outputs", "split_chunks", "blocks", "chunks"])
def _tiles(
    x,
    y,
    data,
    scales,
    row_units,
    blocks,
    chunks,
    rows,
    outputs,
    split_chunks,
    x_stride,
    y_stride,
    split_stride,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CODES: tl.constexpr,
    RUNS: tl.constexpr,
    SPACING: tl.constexpr,
    ZERO: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_AT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of rows, tiles of outputs, splits): split s goes to y + s * split_stride."""
    place = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    split = tl.program_id(2)
    is_row, is_output = place < rows, output < outputs
    first = split * split_chunks
    total = multiply_tiles(
        *(x, place.to(tl.int64) * x_stride, is_row, output.to(tl.int64), is_output),
        *(data, scales, row_units, blocks, first, tl.minimum(chunks, first + split_chunks)),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
        *(PRECISION, UPCAST),
    )
    to = y + split.to(tl.int64) * split_stride
    to += place.to(tl.int64)[:, None] * y_stride + output[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["outputs", "splits", "split_stride"])
def _add_up(partial, y, outputs, splits, split_stride, y_stride, ELEMENTS: tl.constexpr):
    """Grid (M, tiles of outputs): float32 [splits, M, outputs] -> [M, outputs]."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = output < outputs
    at = partial + row * outputs + output
    total = tl.zeros([ELEMENTS], tl.float32)
    for split in range(splits):
        total += tl.load(at + split * split_stride, mask=mask, other=0.0)
    tl.store(y + row * y_stride + output, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows", "blocks", "chunks"])
def _unpack(
    ids,
    y,
    data,
    scales,
    row_units,
    blocks,
    chunks,
    first_row,
    rows,
    y_stride,
    HAS_IDS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    CODES: tl.constexpr,
    RUNS: tl.constexpr,
    SPACING: tl.constexpr,
    ZERO: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_AT: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_AT: tl.constexpr,
):
    """Grid (rows of y, tiles of chunks): rows *ids* less *first_row*, or those from it on.

    What is none of *rows* is zeros.
    """
    place = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)
    if HAS_IDS:
        row = tl.load(ids + place + tl.arange(0, 1)).to(tl.int64) - first_row
    else:
        row = first_row + place + tl.arange(0, 1)
    is_row = (row >= 0) & (row < rows)
    mask = is_row[:, None] & (chunk < chunks)[None, :]
    found = load_chunks(data, row, chunk, mask, row_units, CODES)
    high = load_high(data, row, chunk, mask, row_units, blocks, RUNS, HIGH, HIGH_AT)
    for part in tl.static_range(RUNS):
        run = run_of(chunk, RUNS, SPACING, part)
        code = codes_of(
            *(data, found, high, row, chunk, run, mask, row_units, blocks),
            *(part, CODES, RUNS, ZERO, HIGH, HIGH_AT),
        )
        scale, least = load_scales(
            data, scales, row, run, mask, row_units, blocks, SCALES, SCALES_AT
        )
        weights = tl.where(mask[:, :, None], code * scale[:, :, None] + least[:, :, None], 0.0)
        at = y + place * y_stride + (run * 16)[None, :, None] + tl.arange(0, 16)[None, None, :]
        is_place = (chunk < chunks)[None, :, None]
        tl.store(at, weights.to(y.dtype.element_ty), mask=is_place)


def linear_into(y: Tensor, x: Tensor, part: Part, *, is_batch_invariant: bool = False) -> None:
    """X [M, K] times the transpose of planar *part* [N, K] into y [M, N], rounded once.

    Both have contiguous rows; y may be columns of something wider.
    """
    rows = x.size(0)
    if not rows:
        return
    packed = Packed.of(part)
    if is_batch_invariant:
        _launch_tiles(y, x, packed, _invariant_tiling(part.rows, packed))
    elif rows == 1:
        _launch_vector(y, x, packed)
    elif rows < UNPACKED_FROM and x.dtype != torch.float32:
        _launch_tiles(y, x, packed, _tiling(rows, part.rows, packed))
    else:
        _multiply_unpacked(y, x, part)


def rows(part: Part, ids: Tensor, first: int = 0) -> Tensor:
    """Rows *ids* [T] of planar *part*, which begins at *first* -> float32 [T, K].

    What is no row of it is zeros: the device cannot raise, and may not end for one request.
    """
    ids = ids.contiguous()
    y = torch.empty((ids.size(0), part.columns), dtype=torch.float32, device=ids.device)
    _launch_unpack(y, part, ids=ids, first_row=first)
    return y


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: the sizes of a tile, and how many programs share its columns."""

    rows: int
    outputs: int
    chunks: int
    splits: int = 1


def _tiling(rows: int, outputs: int, packed: Packed) -> Tiling:
    """Return tiles that leave no processor idle, as far as there are columns to share."""
    runs = packed.format.RUNS
    if rows > SPLIT_UP_TO:
        return Tiling(128, 128, 4 // runs)
    is_few = rows <= 16
    chunks = (16 if is_few else 8) // runs  # more of 64 rows take more than 99 KiB of shared memory
    splits = min(PROGRAMS // triton.cdiv(outputs, 64), packed.chunks // (4 * chunks))
    return Tiling(16 if is_few else 64, 64, chunks, max(1, splits))


def _invariant_tiling(outputs: int, packed: Packed) -> Tiling:
    return Tiling(64, 64 if outputs >= 64 * 128 else 32, 8 // packed.format.RUNS)


def _launch_vector(y: Tensor, x: Tensor, packed: Packed) -> None:
    outputs = y.size(1)
    _vector[(triton.cdiv(outputs, VECTOR_OUTPUTS),)](
        *(x, y, *packed.arguments, packed.chunks, outputs),
        OUTPUTS=VECTOR_OUTPUTS,
        TILE_CHUNKS=min(VECTOR_CHUNKS, triton.next_power_of_2(packed.chunks)),
        **packed.constants,
        num_warps=1,
        enable_fp_fusion=True,
    )


def _launch_tiles(y: Tensor, x: Tensor, packed: Packed, tiling: Tiling) -> None:
    rows, outputs = y.shape
    to, split_stride = y, 0
    if tiling.splits > 1:
        to = torch.empty((tiling.splits, rows, outputs), dtype=torch.float32, device=y.device)
        split_stride = to.stride(0)
    split_chunks = triton.cdiv(triton.cdiv(packed.chunks, tiling.splits), tiling.chunks)
    grid = (triton.cdiv(rows, tiling.rows), triton.cdiv(outputs, tiling.outputs), tiling.splits)
    is_wide = x.dtype == torch.float32
    _tiles[grid](
        *(x, to, *packed.arguments, packed.chunks, rows, outputs, split_chunks * tiling.chunks),
        *(x.stride(0), to.stride(-2), split_stride),
        TILE_ROWS=tiling.rows,
        TILE_OUTPUTS=tiling.outputs,
        TILE_CHUNKS=tiling.chunks,
        **packed.constants,
        PRECISION="ieee" if is_wide else "tf32",
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=8 if tiling.rows > SPLIT_UP_TO else 4,
        num_stages=2 if is_wide else 3,
        enable_fp_fusion=True,
    )
    if tiling.splits > 1:
        _add_up[(rows, triton.cdiv(outputs, 1024))](
            to,
            y,
            outputs,
            tiling.splits,
            split_stride,
            y.stride(0),
            ELEMENTS=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _multiply_unpacked(y: Tensor, x: Tensor, part: Part) -> None:
    """Have torch multiply with some rows of *part* after the other."""
    at_once = max(1, UNPACKED_ELEMENTS // part.columns)
    for first in range(0, part.rows, at_once):
        rows = min(at_once, part.rows - first)
        weights = torch.empty((rows, part.columns), dtype=x.dtype, device=x.device)
        _launch_unpack(weights, part, first_row=first)
        y[:, first : first + rows] = F.linear(x, weights)


def _launch_unpack(y: Tensor, part: Part, *, ids: Tensor | None = None, first_row: int = 0) -> None:
    if not y.size(0):
        return
    packed = Packed.of(part)
    tile = min(UNPACK_CHUNKS, triton.next_power_of_2(packed.chunks))
    _unpack[(y.size(0), triton.cdiv(packed.chunks, tile))](
        *(y if ids is None else ids, y, *packed.arguments, packed.chunks, first_row, part.rows),
        y.stride(0),
        HAS_IDS=ids is not None,
        TILE_CHUNKS=tile,
        **packed.constants,
        num_warps=1,
        enable_fp_fusion=True,
    )
