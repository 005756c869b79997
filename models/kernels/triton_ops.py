"""What lies between the products of a transformer block on a GPU, in Triton, one kernel per visit.

Each of these moves its inputs once where torch's own operators move them several times:

    rms_norm, add_rms_norm   the sum with the residual stream, its square sum, and the scaling
    rotate_and_store         queries turned; keys turned and written to the cache; values written
    silu_multiply            silu of one half times the other
    add_bias                 the sum in float32, rounded once

Arithmetic is float32; results are rounded where ``reference`` rounds them, except that
``silu_multiply`` does not round the silu by itself. A row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""Elements of an output that one program of an element-wise kernel makes."""

HEAD_ELEMENTS = 2048
"""Elements that one program takes of a token's heads."""


@triton.jit
def _rms_norm(
    x,
    y,
    weight,
    total,
    normed,
    eps,
    token_stride,
    heads,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    HAS_SUM: tl.constexpr,
):
    """Grid (T, ceil(heads / HEADS)): x [T, heads, SIZE] with only the tokens strided."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    element = tl.arange(0, PADDED_SIZE)
    mask = (head < heads)[:, None] & (element < SIZE)[None, :]
    within = head[:, None] * SIZE + element[None, :]
    row = tl.load(x + token * token_stride + within, mask=mask, other=0.0)
    if HAS_SUM:
        other = tl.load(y + token * heads * SIZE + within, mask=mask, other=0.0)
        row = (row.to(tl.float32) + other.to(tl.float32)).to(row.dtype)
        tl.store(total + token * heads * SIZE + within, row, mask=mask)
    wide = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    weights = tl.load(weight + element, mask=element < SIZE, other=0.0)
    result = weights[None, :] * (wide * scale[:, None])
    tl.store(normed + token * heads * SIZE + within, result.to(row.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[M, K] -> [M, K], or each head by itself, [T, heads, K] -> [T, heads, K]; weight float32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, eps, (y, y))
    return y


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[M, K] and [M, K] -> their sum [M, K], and that normalised [M, K]."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch_rms_norm(x, y.contiguous(), weight, eps, (total, normed))
    return total, normed


def _launch_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, to: tuple[Tensor, Tensor]
) -> None:
    """Write the sum, where there is one, and what is normalised *to* two places."""
    x = _heads_together(x if x.dim() == 3 else x[:, None])
    tokens, heads, size = x.shape
    padded = triton.next_power_of_2(size)
    at_once = max(1, min(HEAD_ELEMENTS // padded, triton.next_power_of_2(heads)))
    if not tokens:
        return
    _rms_norm[(tokens, triton.cdiv(heads, at_once))](
        *(x, x if y is None else y, weight, *to, eps, x.stride(0), heads),
        HEADS=at_once,
        SIZE=size,
        PADDED_SIZE=padded,
        HAS_SUM=y is not None,
        num_warps=_warps(at_once * padded),
        enable_fp_fusion=True,
    )


@triton.jit
def _turn(x, cosine, sine, mask, HALF: tl.constexpr):
    """Return the halves of the elements at *x* and at x + HALF, turned, in their own width."""
    first = tl.load(x, mask=mask, other=0.0)
    second = tl.load(x + HALF, mask=mask, other=0.0)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    turned = (a * cosine - b * sine).to(first.dtype)
    other = (b * cosine + a * sine).to(first.dtype)
    return turned, other


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotate_and_store(
    q,
    k,
    v,
    cosines,
    sines,
    slots,
    rotated,
    keys,
    values,
    q_stride,
    k_stride,
    v_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_REST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Grid (T, heads of q, then heads of k and v, HEADS at a time); a slot below 0 is none.

    Of a head the first 2 * HALF elements turn, those up to SIZE do not.
    """
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, PADDED_HALF)
    is_half = half < HALF
    cosine = tl.load(cosines + token * HALF + half, mask=is_half, other=0.0)[None, :]
    sine = tl.load(sines + token * HALF + half, mask=is_half, other=0.0)[None, :]
    program = tl.program_id(1)
    q_programs: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    if program < q_programs:
        q_head = (program * HEADS + tl.arange(0, HEADS))[:, None]
        is_q = (q_head < Q_HEADS) & is_half[None, :]
        q_at = q_head * SIZE + half[None, :]
        q_first, q_second = _turn(q + token * q_stride + q_at, cosine, sine, is_q, HALF)
        q_to = rotated + token * (Q_HEADS * SIZE) + q_at
        tl.store(q_to, q_first, mask=is_q)
        tl.store(q_to + HALF, q_second, mask=is_q)
        if SIZE > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
            is_rest = (q_head < Q_HEADS) & (rest < SIZE)
            unturned = tl.load(q + token * q_stride + q_head * SIZE + rest, mask=is_rest)
            tl.store(rotated + (token * Q_HEADS + q_head) * SIZE + rest, unturned, mask=is_rest)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = ((program - q_programs) * HEADS + tl.arange(0, HEADS))[:, None]
        is_stored = head < tl.where(slot < 0, 0, KV_HEADS)
        mask = is_stored & is_half[None, :]
        at = head * SIZE + half[None, :]
        block = slot // BLOCK_TOKENS
        within = slot % BLOCK_TOKENS
        k_head = keys + block * key_block_stride + within * key_token_stride
        k_head += head * key_head_stride
        k_to = k_head + half[None, :]
        k_first, k_second = _turn(k + token * k_stride + at, cosine, sine, mask, HALF)
        tl.store(k_to, k_first.to(keys.dtype.element_ty), mask=mask)
        tl.store(k_to + HALF, k_second.to(keys.dtype.element_ty), mask=mask)
        v_head = values + block * value_block_stride + within * value_token_stride
        v_head += head * value_head_stride
        v_to = v_head + half[None, :]
        v_from = v + token * v_stride + at
        v_first = tl.load(v_from, mask=mask, other=0.0)
        v_second = tl.load(v_from + HALF, mask=mask, other=0.0)
        tl.store(v_to, v_first.to(values.dtype.element_ty), mask=mask)
        tl.store(v_to + HALF, v_second.to(values.dtype.element_ty), mask=mask)
        if SIZE > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
            is_rest = is_stored & (rest < SIZE)
            k_rest = tl.load(k + token * k_stride + head * SIZE + rest, mask=is_rest)
            tl.store(k_head + rest, k_rest.to(keys.dtype.element_ty), mask=is_rest)
            v_rest = tl.load(v + token * v_stride + head * SIZE + rest, mask=is_rest)
            tl.store(v_head + rest, v_rest.to(values.dtype.element_ty), mask=is_rest)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """Turn q [T, N, D] -> [T, N, D]; write k [T, K, D], turned, and v [T, K, D] to their slots.

    Cosines and sines are float32 [T, D / 2], or fewer: then what is behind them does not turn. The
    cache is [blocks, block_tokens, K, D] with D contiguous.
    """
    q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
    tokens, heads, size = q.shape
    kv_heads = k.size(1)
    rotated = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    if not tokens:
        return rotated
    half = cosines.size(1)
    padded, padded_rest = (triton.next_power_of_2(max(1, n)) for n in (half, size - 2 * half))
    elements = triton.next_power_of_2(size)
    at_once = max(1, min(HEAD_ELEMENTS // elements, triton.next_power_of_2(max(heads, kv_heads))))
    programs = triton.cdiv(heads, at_once) + triton.cdiv(kv_heads, at_once)
    _rotate_and_store[(tokens, programs)](
        *(q, k, v, cosines, sines, slots, rotated, keys, values),
        *(q.stride(0), k.stride(0), v.stride(0)),
        *(*keys.stride()[:3], *values.stride()[:3]),
        Q_HEADS=heads,
        KV_HEADS=kv_heads,
        HEADS=at_once,
        HALF=half,
        PADDED_HALF=padded,
        SIZE=size,
        PADDED_REST=padded_rest,
        BLOCK_TOKENS=keys.size(1),
        num_warps=_warps(at_once * elements),
        enable_fp_fusion=True,
    )
    return rotated


@triton.jit
def _silu_multiply(gate_up, out, columns, ELEMENTS: tl.constexpr):
    """Grid (M, ceil(columns / ELEMENTS))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = column < columns
    at = gate_up + row * 2 * columns + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=mask)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """[M, 2 K] -> [M, K]: silu of the first half times the second (Shazeer, arXiv:2002.05202)."""
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.size(0), gate_up.size(1) // 2
    out = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_multiply[(rows, triton.cdiv(columns, ELEMENTS))](
            gate_up, out, columns, ELEMENTS=ELEMENTS, num_warps=4, enable_fp_fusion=True
        )
    return out


@triton.jit
def _add_bias(y, bias, out, columns, ELEMENTS: tl.constexpr):
    """Grid (M, ceil(columns / ELEMENTS))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = column < columns
    total = tl.load(y + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + column, mask=mask, other=0.0)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=mask)


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """[M, N] + float32 [N] -> [M, N] in the dtype of *y*."""
    y = y.contiguous()
    out = torch.empty_like(y)
    if y.size(0):
        _add_bias[(y.size(0), triton.cdiv(y.size(1), ELEMENTS))](
            y, bias, out, y.size(1), ELEMENTS=ELEMENTS, num_warps=4, enable_fp_fusion=True
        )
    return out


def _heads_together(x: Tensor) -> Tensor:
    """[T, heads, D] with only the tokens strided, as the kernels read it."""
    return x if x.stride()[1:] == (x.size(2), 1) else x.contiguous()


def _warps(elements: int) -> int:
    """Return the warps for a program of so many elements: about 16 for each thread."""
    return max(1, min(16, elements // 512))
