"""Attention over the paged cache on a GPU, in Triton: prompt chunks and single tokens alike.

One program takes a tile of queries of one sequence and one key-value head, and goes through the
keys that the tile may see, a block at a time, with a running softmax (FlashAttention-2: Dao,
arXiv:2307.08691). The rows of a tile are (token, query head of the group), so that a key is read
once for all the query heads that share it:

    row   0   1   2   3   4   5   6   7   8 ...      group of 3 query heads, tile of 16 rows:
    token 0   0   0   1   1   1   2   2   2 ...      5 tokens, and a row that is left over
    head  0   1   2   0   1   2   0   1   2 ...

A sequence of many tokens has tiles enough to fill the device. One that decodes has a single row per
head and perhaps a long context, so the context is cut into splits, one program each, and a second
kernel merges what they found by their log-sum-exp (Flash-Decoding: Dao, Haziza, Massa and Sizov,
2023; pytorch.org/blog/flash-decoding). ``attention_cut`` decides how. Where splits are fixed a row
has the same bits in every step: keys that it may not see add exact zeros.

What changes from step to step is no constant of a kernel, so that six variants of it serve a model;
``cuda_attention`` has them compiled before the first request.

The grid follows from shapes alone. Lengths are read on the device; what has nothing to do ends at
once. So a launch can be captured in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels.attention_cut import (
    MIN_SPLIT_TOKENS,
    PARTIAL_FLOATS,
    Cut,
    Work,
    as_it_suits,
    in_fixed_splits,
)

LOG2_E = 1.4426950408889634
MERGED_AT_ONCE = 16
LARGEST_HEAD = 256


@triton.jit
def _sequence_of_tile(tile, query_starts, sequences, first, end, TOKENS: tl.constexpr):
    """Return the sequence whose tile this is: s has its first at start_s // TOKENS + s.

    Sequence s brings ceil(length / TOKENS) tiles, and there is room for them before s + 1's.
    """
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        start = tl.minimum(tl.maximum(tl.load(query_starts + middle), first), end) - first
        if start // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _sequence_of_token(token, query_starts, sequences):
    """Return the sequence that *token* of the step belongs to."""
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) <= token:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _split_length(context, splits, FIXED: tl.constexpr, KEYS: tl.constexpr, SHORTEST: tl.constexpr):
    """Positions of one split: FIXED, or as many as share *context* among *splits*."""
    length = tl.maximum(tl.cdiv(tl.cdiv(context, splits), KEYS) * KEYS, SHORTEST)
    if FIXED > 0:
        length = FIXED
    return length


@triton.jit(
    do_not_specialize=["sequences", "first_token", "end_token", "splits", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_tokens"],
)
def _attend(
    q,
    keys,
    values,
    block_tables,
    query_starts,
    context_tokens,
    out,
    partial_out,
    partial_lse,
    scale_log2,
    sequences,
    first_token,
    end_token,
    splits,
    q_token_stride,
    q_head_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
    SHORTEST_SPLIT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles, K, splits): one tile of queries against one split of its sequence's context.

    Takes part only in the tokens of the step from *first_token* to *end_token*.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = _sequence_of_tile(tile, query_starts, sequences, first_token, end_token, TOKENS)
    start = tl.load(query_starts + sequence)
    end = tl.load(query_starts + sequence + 1)
    mine = tl.minimum(tl.maximum(start, first_token), end_token)
    token = mine + (tile - (mine - first_token) // TOKENS - sequence) * TOKENS
    last = tl.minimum(end, end_token)
    if token >= last:
        return
    context = tl.load(context_tokens + sequence)
    visible = context - tl.maximum(end - token - TOKENS, 0)  # what the tile's last token sees
    first_key = 0
    end_key = visible
    if IS_SPLIT:
        length = _split_length(context, splits, FIXED_SPLIT, KEYS, SHORTEST_SPLIT)
        first_key = split * length
        end_key = tl.minimum(visible, first_key + length)
        if first_key >= end_key:
            return

    row = tl.arange(0, ROWS)
    row_token = token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < TOKENS * GROUP) & (row_token < last)
    row_visible = context - end + row_token + 1
    element = tl.arange(0, PADDED_SIZE)
    is_element = element < SIZE

    q_at = row_token.to(tl.int64) * q_token_stride + head * q_head_stride
    query = tl.load(
        q + q_at[:, None] + element[None, :], mask=is_row[:, None] & is_element[None, :], other=0.0
    )
    if UPCAST:
        query = query.to(tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_SIZE], tl.float32)
    for block_start in range(first_key, end_key, KEYS):
        position = block_start + tl.arange(0, KEYS)
        is_key = position < end_key
        block = tl.load(
            block_tables + sequence * table_stride + position // BLOCK_TOKENS, mask=is_key, other=0
        ).to(tl.int64)
        within = position % BLOCK_TOKENS
        key_at = block * key_block_stride + within * key_token_stride + kv_head * key_head_stride
        key = tl.load(
            keys + key_at[None, :] + element[:, None],
            mask=is_key[None, :] & is_element[:, None],
            other=0.0,
        ).to(query.dtype)
        scores = tl.dot(query, key, input_precision=PRECISION) * scale_log2
        scores = tl.where(position[None, :] < row_visible[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet
        shrink = tl.exp2(highest - finite)
        share = tl.exp2(scores - finite[:, None])
        weight = weight * shrink + tl.sum(share, 1)
        value_at = (
            block * value_block_stride + within * value_token_stride + kv_head * value_head_stride
        )
        value = tl.load(
            values + value_at[:, None] + element[None, :],
            mask=is_key[:, None] & is_element[None, :],
            other=0.0,
        ).to(query.dtype)
        total = total * shrink[:, None] + tl.dot(
            share.to(query.dtype), value, input_precision=PRECISION
        )
        highest = higher

    some = tl.where(weight == 0.0, 1.0, weight)
    result = total / some[:, None]
    is_result = is_row[:, None] & is_element[None, :]
    if IS_SPLIT:
        at = ((row_token - first_token) * HEADS + head) * splits + split
        tl.store(partial_out + at[:, None] * SIZE + element[None, :], result, mask=is_result)
        tl.store(partial_lse + at, highest + tl.log2(some), mask=is_row)
    else:
        at = row_token.to(tl.int64) * HEADS + head
        tl.store(
            out + at[:, None] * SIZE + element[None, :],
            result.to(out.dtype.element_ty),
            mask=is_result,
        )


@triton.jit(
    do_not_specialize=["sequences", "first_token", "splits"],
    do_not_specialize_on_alignment=["query_starts", "context_tokens"],
)
def _merge(
    partial_out,
    partial_lse,
    query_starts,
    context_tokens,
    out,
    sequences,
    first_token,
    splits,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
    SHORTEST_SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (tokens, N): the splits of one row into its output."""
    place = tl.program_id(0)
    head = tl.program_id(1)
    token = first_token + place
    sequence = _sequence_of_token(token, query_starts, sequences)
    context = tl.load(context_tokens + sequence)
    visible = context - tl.load(query_starts + sequence + 1) + token + 1
    length = _split_length(context, splits, FIXED_SPLIT, KEYS, SHORTEST_SPLIT)
    used = tl.cdiv(tl.maximum(visible, 0), length)

    element = tl.arange(0, PADDED_SIZE)
    is_element = element < SIZE
    highest = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    total = tl.zeros([PADDED_SIZE], tl.float32)
    for first in range(0, used, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        is_split = split < used
        at = (place * HEADS + head) * splits + split
        lse = tl.load(partial_lse + at, mask=is_split, other=float("-inf"))
        found = tl.load(
            partial_out + at[:, None] * SIZE + element[None, :],
            mask=is_split[:, None] & is_element[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(lse, 0))
        shrink = tl.exp2(highest - higher)
        share = tl.exp2(lse - higher)
        weight = weight * shrink + tl.sum(share, 0)
        total = total * shrink + tl.sum(found * share[:, None], 0)
        highest = higher
    result = total / tl.where(weight == 0.0, 1.0, weight)
    at = (token.to(tl.int64) * HEADS + head) * SIZE
    tl.store(out + at + element, result.to(out.dtype.element_ty), mask=is_element)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    scale: float,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Q [T, N, D] against one layer's cache, causally -> [T, N, D].

    Keys and values are [blocks, block_tokens, K, D], D at most 256, with D contiguous. Sequences
    may have no token in the step; one without any context gives zeros. Raises ValueError.
    """
    tokens, heads, size = q.shape
    if size > LARGEST_HEAD:
        raise ValueError(f"heads of {size} elements; a tile holds {LARGEST_HEAD}")
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    blocks = batch.block_tables.size(1)
    work = Work(
        tokens,
        batch.block_tables.size(0),
        heads,
        kv_heads=keys.size(2),
        size=size,
        longest=blocks * keys.size(1),
        dtype=q.dtype,
    )
    cut = in_fixed_splits(work) if batch_invariant else as_it_suits(work, _processors(q.device))
    partial_out, partial_lse = _room(work, cut, out)
    for first in range(0, tokens, cut.tokens_at_once):
        end = min(first + cut.tokens_at_once, tokens)
        tiles = (end - first) // cut.tile_tokens + work.sequences
        _attend[(tiles, work.kv_heads, cut.splits)](
            *(q, keys, values),
            *(batch.block_tables, batch.query_starts, batch.context_tokens),
            *(out, partial_out, partial_lse),
            scale * LOG2_E,
            *(work.sequences, first, end, cut.splits),
            *(*q.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
            batch.block_tables.stride(0),
            HEADS=heads,
            GROUP=work.group,
            SIZE=size,
            PADDED_SIZE=max(16, triton.next_power_of_2(size)),
            BLOCK_TOKENS=keys.size(1),
            ROWS=cut.tile.rows,
            TOKENS=cut.tile_tokens,
            KEYS=cut.tile.keys,
            FIXED_SPLIT=cut.fixed_split,
            SHORTEST_SPLIT=MIN_SPLIT_TOKENS,
            IS_SPLIT=cut.is_split,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            UPCAST=triton.knobs.runtime.interpret,
            num_warps=cut.tile.warps,
            num_stages=cut.tile.stages,
            enable_fp_fusion=True,
        )
        if cut.is_split:
            _merge[(end - first, heads)](
                *(partial_out, partial_lse, batch.query_starts, batch.context_tokens, out),
                *(work.sequences, first, cut.splits),
                HEADS=heads,
                SIZE=size,
                PADDED_SIZE=triton.next_power_of_2(size),
                KEYS=cut.tile.keys,
                FIXED_SPLIT=cut.fixed_split,
                SHORTEST_SPLIT=MIN_SPLIT_TOKENS,
                AT_ONCE=MERGED_AT_ONCE,
                num_warps=2,
                enable_fp_fusion=True,
            )
    return out


def _room(work: Work, cut: Cut, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 places for results [rows, N, D] and their log-sum-exp [rows, N] of splits.

    Where nothing is split they are *out*, and not written.
    """
    if not cut.is_split:
        return out, out
    rows = max(work.partial_rows, min(cut.tokens_at_once, work.tokens) * cut.splits)
    results = rows * work.heads * work.size
    floats = max(PARTIAL_FLOATS, results + rows * work.heads)
    room = torch.empty(floats, dtype=torch.float32, device=out.device)
    return room, room[results:]


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small one's number where Triton's interpreter stands in."""
    if device.type != "cuda":
        return 16
    return torch.cuda.get_device_properties(device).multi_processor_count
