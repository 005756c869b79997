"""A matrix product whose rows do not know of one another, in Triton.

A vendor's library chooses tile and split by the number of rows, and so another order of the sums:
the same sequence gets other bits in another batch. Here the tile follows from the weights' shape
and every output is summed over K from its beginning to its end, a block at a time, by one program
(He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025). The price is
the library's better schedule for every number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of a tile, whatever their number: a few rows fill it with zeros, which costs a device that
waits for the weights little."""

TILES = 128
"""Tiles across the outputs that keep a large device busy with a few rows."""


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    weight,
    y,
    rows,
    x_stride,
    weight_stride,
    y_stride,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of rows, tiles of outputs)."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    is_row = row < rows
    is_output = output < OUTPUTS
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    weight_row = weight + output.to(tl.int64)[None, :] * weight_stride
    total = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for first in range(0, INPUTS, TILE_INPUTS):
        column = first + tl.arange(0, TILE_INPUTS)
        is_column = column < INPUTS
        a = tl.load(x_row + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        b = tl.load(
            weight_row + column[:, None], mask=is_column[:, None] & is_output[None, :], other=0.0
        )
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total += tl.dot(a, b, input_precision=PRECISION)
    tl.store(
        y + row.to(tl.int64)[:, None] * y_stride + output[None, :],
        total.to(y.dtype.element_ty),
        mask=is_row[:, None] & is_output[None, :],
    )


def linear_into(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """X [M, K] times the transpose of weight [N, K] of the same dtype into y [M, N].

    All have contiguous rows; y may be columns of something wider.
    """
    outputs, inputs = weight.shape
    if not x.size(0):
        return
    tile = _tile_outputs(outputs)
    is_wide = x.dtype == torch.float32
    _linear[(triton.cdiv(x.size(0), ROWS), triton.cdiv(outputs, tile))](
        *(x, weight, y, x.size(0), x.stride(0), weight.stride(0), y.stride(0)),
        OUTPUTS=outputs,
        INPUTS=inputs,
        TILE_ROWS=ROWS,
        TILE_OUTPUTS=tile,
        TILE_INPUTS=32 if is_wide else 64,
        PRECISION="ieee" if is_wide else "tf32",
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=4,
        num_stages=2 if is_wide else 4,
        enable_fp_fusion=True,
    )


def _tile_outputs(outputs: int) -> int:
    """Return the width of a tile: the widest that still makes TILES of them, 32 at least."""
    return next((width for width in (128, 64) if outputs >= width * TILES), 32)
