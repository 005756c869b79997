"""What opens and closes the outputs of a hybrid's mixers on a GPU, in Triton.

Arithmetic is float32, rounded once. A row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""Elements of an output that one program of an element-wise kernel makes."""


@triton.jit
def _gated_rms_norm(
    x, z, weight, y, eps, z_stride, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    """Grid (T, HEADS)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tl.arange(0, PADDED)
    mask = element < SIZE
    at = (token * HEADS + head) * SIZE + element
    row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(z + token * z_stride + head * SIZE + element, mask=mask, other=0.0)
    weights = tl.load(weight + element, mask=mask, other=0.0)
    normed = weights * (row * tl.rsqrt(tl.sum(row * row, 0) / SIZE + eps))
    wide = gate.to(tl.float32)
    result = normed * (wide / (1.0 + tl.exp(-wide)))
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X [T, V, D] and z [T, V * D], whose rows may lie apart -> [T, V * D]."""
    x = x.contiguous()
    tokens, heads, size = x.shape
    y = torch.empty((tokens, heads * size), dtype=x.dtype, device=x.device)
    if tokens:
        _gated_rms_norm[(tokens, heads)](
            *(x, z, weight, y, eps, z.stride(0)),
            HEADS=heads,
            SIZE=size,
            PADDED=triton.next_power_of_2(size),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return y


@triton.jit
def _sigmoid_multiply(x, gate, y, columns, gate_stride, ELEMENTS: tl.constexpr):
    """Grid (M, ceil(columns / ELEMENTS))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = column < columns
    value = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    open_by = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    result = value * tl.sigmoid(open_by)
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=mask)


def sigmoid_multiply(x: Tensor, gate: Tensor) -> Tensor:
    """X [M, K] and a gate [M, K], whose rows may lie apart -> [M, K]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, columns = x.shape
    if rows:
        _sigmoid_multiply[(rows, triton.cdiv(columns, ELEMENTS))](
            *(x, gate, y, columns, gate.stride(0)), ELEMENTS=ELEMENTS, enable_fp_fusion=True
        )
    return y
