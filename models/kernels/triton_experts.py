"""Mixture of experts on a GPU, in Triton: the choice, and the SwiGLUs of all tokens at once.

A *pair* is a token and one of the k experts it chose. Nothing asks the device how many tokens an
expert has, so that a step can be captured in a graph:

    few pairs   each is computed by itself, as a product of one row (``triton_quantized``); an
                expert that several tokens chose is read again, mostly from the cache
    many        pairs are sorted by expert. Expert e has its tiles of rows from start_e // ROWS + e
                on, where there is always room for them, and a program finds its expert by halving

      sorted pairs   e0 e0 e0 e0 e0 e1 e1 e3 ...      ROWS = 4
      tile           0  0  0  0  1  2  2  4  ...      tile 3 is expert 2's, and empty

One kernel makes silu(gate) * up of every pair, one the rows of ``down`` times the pair's weight.
A token's k results are added in the order of its choices, in float32. Batch invariant the way is
always the second, with tiles of one size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cortex.models.kernels.triton_packed import Packed, serves
from cortex.models.kernels.triton_quantized import VECTOR_CHUNKS, dot_runs, multiply_tiles
from cortex.models.quantization import ExpertMatrix, Part

PAIRS_BY_THEMSELVES = 64
"""Pairs up to which each is computed by itself: of 128 experts, 64 choose about 50."""

FEW_ROWS, MANY_ROWS = 16, 64
"""Rows of a tile; the larger from so many pairs per expert on that half of it is filled."""

VECTOR_OUTPUTS = 2
TILE_OUTPUTS = 64
ELEMENTS = 1024


@triton.jit
def _route(
    logits,
    ids,
    weights,
    stride,
    experts,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
):
    """Grid (T)."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED_EXPERTS)
    is_expert = expert < experts
    logit = tl.load(logits + token * stride + expert, mask=is_expert, other=float("-inf"))
    logit = logit.to(tl.float32)
    share = tl.exp(logit - tl.max(logit, 0))
    left = tl.where(is_expert, share / tl.sum(share, 0), -1.0)
    choice = tl.arange(0, PADDED_K)
    chosen = tl.zeros([PADDED_K], tl.float32)
    found = tl.zeros([PADDED_K], tl.int64)
    for place in tl.static_range(TOP_K):
        most = tl.max(left, 0)
        first = tl.min(tl.where(left == most, expert, PADDED_EXPERTS), 0)
        first = tl.minimum(first, experts - 1)  # of NaN none is the most, and no id may be beyond
        chosen = tl.where(choice == place, most, chosen)
        found = tl.where(choice == place, first.to(tl.int64), found)
        left = tl.where(expert == first, -1.0, left)
    if IS_NORMALISED:
        chosen = chosen / tl.sum(chosen, 0)
    tl.store(ids + token * TOP_K + choice, found, mask=choice < TOP_K)
    tl.store(weights + token * TOP_K + choice, chosen, mask=choice < TOP_K)


def route(logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> ids [T, k] int64 and weights [T, k] float32, by falling weight."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            *(logits, ids, weights, logits.stride(0), experts),
            PADDED_EXPERTS=triton.next_power_of_2(experts),
            TOP_K=top_k,
            PADDED_K=triton.next_power_of_2(top_k),
            IS_NORMALISED=is_normalised,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return ids, weights


@triton.jit
def _silu_multiply(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["outputs", "top_k", "blocks", "chunks"])
def _gate_up_of_pairs(
    x,
    ids,
    inner,
    gate,
    gate_scales,
    up,
    up_scales,
    row_units,
    blocks,
    chunks,
    outputs,
    top_k,
    x_stride,
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
    """Grid (pairs, tiles of outputs): silu(gate x) * up x of each -> inner [pairs, outputs]."""
    pair = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < outputs
    row = tl.load(ids + pair) * outputs + output
    x += pair // top_k * x_stride
    gated = dot_runs(
        *(x, row, is_output, gate, gate_scales, row_units, blocks, chunks),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
    )
    raised = dot_runs(
        *(x, row, is_output, up, up_scales, row_units, blocks, chunks),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
    )
    result = _silu_multiply(gated, raised).to(inner.dtype.element_ty)
    tl.store(inner + pair * outputs + output, result, mask=is_output)


@triton.jit(do_not_specialize=["outputs", "top_k", "blocks", "chunks"])
def _down_of_pairs(
    inner,
    ids,
    weights,
    y,
    data,
    scales,
    row_units,
    blocks,
    chunks,
    outputs,
    top_k,
    inner_stride,
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
    """Grid (T, tiles of outputs): what a token's experts make of their pairs, added up."""
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < outputs
    total = tl.zeros([OUTPUTS], tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        found = dot_runs(
            *(inner + pair * inner_stride, tl.load(ids + pair) * outputs + output, is_output),
            *(data, scales, row_units, blocks, chunks),
            *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
        )
        total += tl.load(weights + pair) * found
    tl.store(y + token * outputs + output, total.to(y.dtype.element_ty), mask=is_output)


@triton.jit
def _rows_of_tile(tile, starts, experts, ROWS: tl.constexpr):
    """Return the expert whose tile this is, its first sorted pair, and where the expert's end."""
    low = 0
    high = experts
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    expert = low - 1
    start = tl.load(starts + expert)
    return expert, start + (tile - start // ROWS - expert) * ROWS, tl.load(starts + expert + 1)


@triton.jit(do_not_specialize=["outputs", "top_k", "experts", "blocks", "chunks"])
def _gate_up_of_tiles(
    x,
    order,
    starts,
    inner,
    gate,
    gate_scales,
    up,
    up_scales,
    row_units,
    blocks,
    chunks,
    outputs,
    experts,
    top_k,
    x_stride,
    TILE_ROWS: tl.constexpr,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of outputs, tiles of pairs): silu(gate x) * up x, in the order of the pairs."""
    expert, first, end = _rows_of_tile(tl.program_id(1), starts, experts, TILE_ROWS)
    if first >= end:
        return
    place = first + tl.arange(0, TILE_ROWS)
    is_place = place < end
    token = tl.load(order + place, mask=is_place, other=0) // top_k
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < outputs
    row = tl.cast(expert, tl.int64) * outputs + output
    gated = multiply_tiles(
        *(x, token * x_stride, is_place, row, is_output, gate, gate_scales),
        *(row_units, blocks, 0, chunks),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
        *(PRECISION, UPCAST),
    )
    raised = multiply_tiles(
        *(x, token * x_stride, is_place, row, is_output, up, up_scales),
        *(row_units, blocks, 0, chunks),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
        *(PRECISION, UPCAST),
    )
    result = _silu_multiply(gated, raised).to(inner.dtype.element_ty)
    at = inner + place[:, None] * outputs + output[None, :]
    tl.store(at, result, mask=is_place[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["outputs", "experts", "blocks", "chunks"])
def _down_of_tiles(
    inner,
    order,
    starts,
    weights,
    results,
    data,
    scales,
    row_units,
    blocks,
    chunks,
    outputs,
    experts,
    inner_stride,
    TILE_ROWS: tl.constexpr,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of outputs, tiles of pairs): weighted, each to its pair's row of results."""
    expert, first, end = _rows_of_tile(tl.program_id(1), starts, experts, TILE_ROWS)
    if first >= end:
        return
    place = first + tl.arange(0, TILE_ROWS)
    is_place = place < end
    pair = tl.load(order + place, mask=is_place, other=0)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < outputs
    found = multiply_tiles(
        *(inner, place * inner_stride, is_place, tl.cast(expert, tl.int64) * outputs + output),
        *(is_output, data, scales, row_units, blocks, 0, chunks),
        *(TILE_CHUNKS, CODES, RUNS, SPACING, ZERO, HIGH, HIGH_AT, SCALES, SCALES_AT),
        *(PRECISION, UPCAST),
    )
    found *= tl.load(weights + pair, mask=is_place, other=0.0)[:, None]
    at = results + pair[:, None] * outputs + output[None, :]
    tl.store(at, found, mask=is_place[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["outputs", "top_k"])
def _add_choices(results, y, outputs, top_k, ELEMENTS: tl.constexpr):
    """Grid (T, tiles of outputs): float32 [T, k, outputs] -> [T, outputs]."""
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = output < outputs
    total = tl.zeros([ELEMENTS], tl.float32)
    for choice in range(top_k):
        at = results + (token * top_k + choice) * outputs + output
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(y + token * outputs + output, total.to(y.dtype.element_ty), mask=mask)


def can_compute(gate: ExpertMatrix, up: ExpertMatrix, down: ExpertMatrix) -> bool:
    """Whether the kernels serve these matrices: gate and up, read together, are of one type."""
    parts = [part for matrix in (gate, up, down) for part in matrix.parts]
    return len(parts) == 3 and parts[0].kind == parts[1].kind and all(map(serves, parts))


def prepare(
    *,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    dtype: torch.dtype,
    is_batch_invariant: bool,
) -> None:
    """Compile every way that activations of *dtype* may go through these matrices."""
    parts = (gate.parts[0], up.parts[0], down.parts[0])
    x = torch.zeros((1, gate.columns), dtype=dtype, device=parts[0].data.device)
    ids = torch.zeros((1, 2), dtype=torch.int64, device=x.device)
    how = (torch.empty_like(x), x, ids, ids.float(), gate.experts, parts)
    _pairs_by_expert(*how, FEW_ROWS)
    if not is_batch_invariant:
        _pairs_by_expert(*how, MANY_ROWS)
        _pairs_by_themselves(*how)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    is_batch_invariant: bool = False,
) -> Tensor:
    """X [T, H] through the SwiGLUs *ids* [T, k], summed with *weights* [T, k] -> [T, H]."""
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    y = torch.empty_like(x)
    pairs = ids.numel()
    if not pairs:
        return y
    parts = (gate.parts[0], up.parts[0], down.parts[0])
    if pairs <= PAIRS_BY_THEMSELVES and not is_batch_invariant:
        _pairs_by_themselves(y, x, ids, weights, gate.experts, parts)
    else:
        per_expert = 1 if is_batch_invariant else pairs // gate.experts
        rows = MANY_ROWS if per_expert >= MANY_ROWS // 2 else FEW_ROWS
        _pairs_by_expert(y, x, ids, weights, gate.experts, parts, rows)
    return y


def _pairs_by_themselves(
    y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    parts: tuple[Part, Part, Part],
) -> None:
    gate, up, down = map(Packed.of, parts)
    inner_size, size = parts[0].rows // experts, x.size(1)
    inner = torch.empty((ids.numel(), inner_size), dtype=x.dtype, device=x.device)
    _gate_up_of_pairs[(ids.numel(), triton.cdiv(inner_size, VECTOR_OUTPUTS))](
        *(x, ids, inner, gate.data, gate.scales, up.data, up.scales),
        *(gate.row_units, gate.blocks, gate.chunks, inner_size, ids.size(1), x.stride(0)),
        OUTPUTS=VECTOR_OUTPUTS,
        TILE_CHUNKS=_vector_chunks(gate),
        **gate.constants,
        num_warps=1,
        enable_fp_fusion=True,
    )
    _down_of_pairs[(ids.size(0), triton.cdiv(size, VECTOR_OUTPUTS))](
        *(inner, ids, weights, y, *down.arguments, down.chunks, size, ids.size(1)),
        inner.stride(0),
        OUTPUTS=VECTOR_OUTPUTS,
        TILE_CHUNKS=_vector_chunks(down),
        **down.constants,
        num_warps=1,
        enable_fp_fusion=True,
    )


def _pairs_by_expert(
    y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    parts: tuple[Part, Part, Part],
    rows: int,
) -> None:
    gate, up, down = map(Packed.of, parts)
    inner_size, size = parts[0].rows // experts, x.size(1)
    pairs, top_k = ids.numel(), ids.size(1)
    chosen, order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(chosen, torch.arange(experts + 1, device=ids.device))
    inner = torch.empty((pairs, inner_size), dtype=x.dtype, device=x.device)
    results = torch.empty((pairs, size), dtype=torch.float32, device=x.device)
    tiles = pairs // rows + experts
    is_wide = x.dtype == torch.float32
    how = {
        "TILE_ROWS": rows,
        "OUTPUTS": TILE_OUTPUTS,
        "PRECISION": "ieee" if is_wide else "tf32",
        "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": 8 if rows == MANY_ROWS else 4,
        "num_stages": 2 if is_wide else 3,
        "enable_fp_fusion": True,
    }
    _gate_up_of_tiles[(triton.cdiv(inner_size, TILE_OUTPUTS), tiles)](
        *(x, order, starts, inner, gate.data, gate.scales, up.data, up.scales),
        *(gate.row_units, gate.blocks, gate.chunks, inner_size, experts, top_k, x.stride(0)),
        TILE_CHUNKS=8 // gate.format.RUNS,
        **gate.constants,
        **how,
    )
    _down_of_tiles[(triton.cdiv(size, TILE_OUTPUTS), tiles)](
        *(inner, order, starts, weights, results, *down.arguments, down.chunks),
        *(size, experts, inner.stride(0)),
        TILE_CHUNKS=8 // down.format.RUNS,
        **down.constants,
        **how,
    )
    _add_choices[(ids.size(0), triton.cdiv(size, ELEMENTS))](
        results, y, size, top_k, ELEMENTS=ELEMENTS, num_warps=4, enable_fp_fusion=True
    )


def _vector_chunks(packed: Packed) -> int:
    return min(VECTOR_CHUNKS, triton.next_power_of_2(packed.chunks))
