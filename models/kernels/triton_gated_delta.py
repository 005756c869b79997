"""The gated delta rule on a GPU, in Triton; ``reference_delta`` says what it is.

    few tokens per sequence    one after the other, the state in registers
    many                       chunks of 64, first what they need not wait for, then in order

                   chunk 0   chunk 1   chunk 2 ...        grid
    _solve_chunks  W U       W U       W U                chunks x heads, all at once
    _pass_chunks   S ──────► S ──────► S ──────►          sequences x heads x tiles of columns

With T = (1 + what is below the diagonal of beta fade k k^T)^-1, found row by row in float32, a
chunk writes U - W S, where U = T beta v and W = T beta e^G k. Arithmetic is float32; products of it
are made of three of tf32. Where bits must not depend on the batch, all tokens go one by one.

Nothing asks the device for a value: lengths are found in the kernels, and there are as many
programs as there could be chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels.reference_delta import CHUNK_TOKENS, DeltaHeads
from cortex.models.kernels.triton_convolution import LEAST_PADDED

FEW_TOKENS = 8
"""Tokens per sequence, on average, up to which they go one by one."""

COLUMNS = 32
"""Columns of a state that one program works on."""

BLOCK = 64
"""Elements of keys that are multiplied at once."""


@triton.jit
def _gates(ba, rate, bias, token, head, mask, VALUES: tl.constexpr):
    """Return g and beta of tokens of a head; of those without *mask* 0."""
    at = ba + token.to(tl.int64) * (2 * VALUES) + head
    b = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(at + VALUES, mask=mask, other=0.0).to(tl.float32) + tl.load(bias + head)
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    return tl.where(mask, tl.load(rate + head) * softplus, 0.0), tl.where(mask, tl.sigmoid(b), 0.0)


@triton.jit
def _key_of(head, KEYS: tl.constexpr, VALUES: tl.constexpr, IS_TILED: tl.constexpr):
    """Return the key head that a value head reads."""
    return head % KEYS if IS_TILED else head // (VALUES // KEYS)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "contexts"])
def _recurrent(
    qkv,
    ba,
    rate,
    bias,
    states,
    slots,
    starts,
    contexts,
    out,
    scale,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_TILED: tl.constexpr,
    PADDED_KEY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (S, V, ceil(VALUE_DIM / COLUMNS)): token by token, some columns of a head's state."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, PADDED_KEY)
    is_row, is_column = row < KEY_DIM, column < VALUE_DIM
    first, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    goes_on = tl.load(contexts + sequence) > end - first
    slot = tl.load(slots + sequence).to(tl.int64)
    place = states + (slot * VALUES + head) * (KEY_DIM * VALUE_DIM)
    place += row[:, None] * VALUE_DIM + column[None, :]
    is_there = (row < tl.where(goes_on, KEY_DIM, 0))[:, None] & is_column[None, :]
    state = tl.load(place, mask=is_there, other=0.0)
    key = _key_of(head, KEYS, VALUES, IS_TILED)
    for t in range(end - first):
        token = first + t
        at = qkv + token.to(tl.int64) * (2 * KEYS * KEY_DIM + VALUES * VALUE_DIM)
        q = tl.load(at + key * KEY_DIM + row, mask=is_row, other=0.0).to(tl.float32)
        k = tl.load(at + (KEYS + key) * KEY_DIM + row, mask=is_row, other=0.0).to(tl.float32)
        v_at = at + 2 * KEYS * KEY_DIM + head * VALUE_DIM + column
        v = tl.load(v_at, mask=is_column, other=0.0).to(tl.float32)
        q *= scale * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        g, beta = _gates(ba, rate, bias, token, head, token >= 0, VALUES)
        state *= tl.exp(g)
        written = beta * (v - tl.sum(state * k[:, None], 0))
        state += k[:, None] * written[None, :]
        result = tl.sum(state * q[:, None], 0).to(out.dtype.element_ty)
        to = out + (token.to(tl.int64) * VALUES + head) * VALUE_DIM + column
        tl.store(to, result, mask=is_column)
    has_tokens = (row < tl.where(end > first, KEY_DIM, 0))[:, None]
    tl.store(place, state, mask=has_tokens & is_column[None, :])


@triton.jit
def _fade(g, TOKENS: tl.constexpr):
    """[n] -> [n, n]: e to the sum of g behind token j up to token i, each summed by itself."""
    i, j = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    sums = tl.cumsum(tl.where(i > j, g[:, None], 0.0), 0)
    return tl.where(i >= j, tl.exp(sums), 0.0)


@triton.jit
def _inverse_norms(
    at, stride, is_token, TOKENS: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Return 1 / length of rows of KEY_DIM elements that lie *stride* apart."""
    t, total = tl.arange(0, TOKENS), tl.zeros((TOKENS,), tl.float32)
    for begin in tl.static_range(0, KEY_DIM, BLOCK):
        x = _rows(at, t, begin, stride, is_token, KEY_DIM, BLOCK)
        total += tl.sum(x * x, 1)
    return tl.rsqrt(total + 1e-6)


@triton.jit
def _rows(at, t, begin, stride, is_token, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return elements [begin, begin + BLOCK) of rows t, those of SIZE that there are."""
    element = begin + tl.arange(0, BLOCK)
    mask = is_token[:, None] & (element < SIZE)[None, :]
    place = at + t[:, None].to(tl.int64) * stride + element[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["starts"])
def _solve_chunks(
    qkv,
    ba,
    rate,
    bias,
    starts,
    u,
    w,
    sequences,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_TILED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (chunks there could be, V): u [T, V, VALUE_DIM] and w [T, V, KEY_DIM] of one chunk."""
    program, head = tl.program_id(0), tl.program_id(1)
    s = tl.arange(0, PADDED)
    begins = tl.load(starts + s, mask=s < sequences, other=0)
    ends = tl.load(starts + s + 1, mask=s < sequences, other=0)
    chunks = (ends - begins + TOKENS - 1) // TOKENS
    is_mine = (tl.cumsum(chunks, 0) > program) & (tl.cumsum(chunks, 0) - chunks <= program)
    before = tl.sum(tl.where(is_mine, tl.cumsum(chunks, 0) - chunks, 0), 0)
    first = tl.sum(tl.where(is_mine, begins, 0), 0) + (program - before) * TOKENS
    tokens = tl.minimum(TOKENS, tl.sum(tl.where(is_mine, ends, 0), 0) - first)

    t = tl.arange(0, TOKENS)
    is_token = t < tokens
    stride: tl.constexpr = 2 * KEYS * KEY_DIM + VALUES * VALUE_DIM
    at = qkv + first.to(tl.int64) * stride
    key = _key_of(head, KEYS, VALUES, IS_TILED)
    k_at = at + (KEYS + key) * KEY_DIM
    norms = _inverse_norms(k_at, stride, is_token, TOKENS, KEY_DIM, BLOCK)
    products = tl.zeros((TOKENS, TOKENS), tl.float32)
    for begin in tl.static_range(0, KEY_DIM, BLOCK):
        k = _rows(k_at, t, begin, stride, is_token, KEY_DIM, BLOCK) * norms[:, None]
        products = tl.dot(k, tl.trans(k), products, input_precision="tf32x3")
    g, beta = _gates(ba, rate, bias, first + t, head, is_token, VALUES)
    below = beta[:, None] * _fade(g, TOKENS) * products
    solution = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    for i in range(1, tokens):
        row = tl.sum(tl.where((t[:, None] == i) & (t[None, :] < i), below, 0.0), 0)
        found = tl.sum(row[:, None] * solution, 0)
        solution -= tl.where(t[:, None] == i, found[None, :], 0.0)

    to = (first + t).to(tl.int64) * VALUES + head
    element = tl.arange(0, BLOCK)
    for begin in tl.static_range(0, VALUE_DIM, BLOCK):
        v_at = at + 2 * KEYS * KEY_DIM + head * VALUE_DIM
        v = _rows(v_at, t, begin, stride, is_token, VALUE_DIM, BLOCK) * beta[:, None]
        mask = is_token[:, None] & (begin + element < VALUE_DIM)[None, :]
        place = u + to[:, None] * VALUE_DIM + begin + element[None, :]
        tl.store(place, tl.dot(solution, v, input_precision="tf32x3"), mask=mask)
    faded = norms * beta * tl.exp(tl.cumsum(g, 0))
    for begin in tl.static_range(0, KEY_DIM, BLOCK):
        k = _rows(k_at, t, begin, stride, is_token, KEY_DIM, BLOCK) * faded[:, None]
        mask = is_token[:, None] & (begin + element < KEY_DIM)[None, :]
        place = w + to[:, None] * KEY_DIM + begin + element[None, :]
        tl.store(place, tl.dot(solution, k, input_precision="tf32x3"), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "contexts"])
def _pass_chunks(
    qkv,
    ba,
    rate,
    bias,
    u,
    w,
    states,
    slots,
    starts,
    contexts,
    out,
    scale,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_TILED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (S, V, ceil(VALUE_DIM / COLUMNS)): chunk by chunk, the state in memory."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < VALUE_DIM
    first, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    goes_on = tl.load(contexts + sequence) > end - first
    slot = tl.load(slots + sequence).to(tl.int64)
    place = states + (slot * VALUES + head) * (KEY_DIM * VALUE_DIM) + column[None, :]
    key = _key_of(head, KEYS, VALUES, IS_TILED)
    stride: tl.constexpr = 2 * KEYS * KEY_DIM + VALUES * VALUE_DIM
    t, element = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    for done in range(0, end - first, TOKENS):
        begin_token = first + done
        is_token = begin_token + t < end
        rows_there = tl.where(goes_on | (begin_token > first), KEY_DIM, 0)
        at = qkv + begin_token.to(tl.int64) * stride
        q_at, k_at = at + key * KEY_DIM, at + (KEYS + key) * KEY_DIM
        q_norms = scale * _inverse_norms(q_at, stride, is_token, TOKENS, KEY_DIM, BLOCK)
        k_norms = _inverse_norms(k_at, stride, is_token, TOKENS, KEY_DIM, BLOCK)
        g, _ = _gates(ba, rate, bias, begin_token + t, head, is_token, VALUES)
        fade = _fade(g, TOKENS)
        since_begin = tl.exp(tl.cumsum(g, 0))
        rows = (begin_token + t).to(tl.int64) * VALUES + head
        mask = is_token[:, None] & is_column[None, :]
        written = tl.load(u + rows[:, None] * VALUE_DIM + column[None, :], mask=mask, other=0.0)
        answers = tl.zeros((TOKENS, COLUMNS), tl.float32)
        products = tl.zeros((TOKENS, TOKENS), tl.float32)
        for begin in tl.static_range(0, KEY_DIM, BLOCK):
            row = begin + element
            state_at = place + row[:, None] * VALUE_DIM
            is_there = (row < rows_there)[:, None] & is_column[None, :]
            state = tl.load(state_at, mask=is_there, other=0.0)
            w_mask = is_token[:, None] & (row < KEY_DIM)[None, :]
            asked = tl.load(w + rows[:, None] * KEY_DIM + row[None, :], mask=w_mask, other=0.0)
            written -= tl.dot(asked, state, input_precision="tf32x3")
            q = _rows(q_at, t, begin, stride, is_token, KEY_DIM, BLOCK) * q_norms[:, None]
            k = _rows(k_at, t, begin, stride, is_token, KEY_DIM, BLOCK) * k_norms[:, None]
            products = tl.dot(q, tl.trans(k), products, input_precision="tf32x3")
            q *= since_begin[:, None]
            answers = tl.dot(q, state, answers, input_precision="tf32x3")
        answers = tl.dot(fade * products, written, answers, input_precision="tf32x3")
        to = out + rows[:, None] * VALUE_DIM + column[None, :]
        tl.store(to, answers.to(out.dtype.element_ty), mask=mask)
        left = tl.sum(tl.where(t[:, None] == TOKENS - 1, fade, 0.0), 0)
        kept = tl.exp(tl.sum(g, 0))
        tl.debug_barrier()  # all have read the state
        for begin in tl.static_range(0, KEY_DIM, BLOCK):
            row = begin + element
            state_at = place + row[:, None] * VALUE_DIM
            is_there = (row < rows_there)[:, None] & is_column[None, :]
            state = kept * tl.load(state_at, mask=is_there, other=0.0)
            k = _rows(k_at, t, begin, stride, is_token, KEY_DIM, BLOCK)
            k *= (k_norms * left)[:, None]
            state = tl.dot(tl.trans(k), written, state, input_precision="tf32x3")
            tl.store(state_at, state, mask=(row < KEY_DIM)[:, None] & is_column[None, :])
        tl.debug_barrier()  # all has been written


def gated_delta_rule(
    qkv: Tensor,
    ba: Tensor,
    rate: Tensor,
    bias: Tensor,
    *,
    states: Tensor,
    heads: DeltaHeads,
    batch: Batch,
) -> Tensor:
    """[q | k | v] [T, C] and [b | a] [T, 2 V] -> [T, V, value_dim]; states float32 [slots, ...]."""
    rule = chunk_delta_rule if has_chunks(qkv, batch) else recurrent_delta_rule
    return rule(qkv, ba, rate, bias, states=states, heads=heads, batch=batch)


def has_chunks(qkv: Tensor, batch: Batch) -> bool:
    """Whether a step has so many tokens that they go by chunks, and may."""
    sequences = batch.query_starts.size(0) - 1
    is_many = qkv.size(0) > FEW_TOKENS * sequences
    return is_many and not batch.cache.execution.is_batch_invariant


def recurrent_delta_rule(
    qkv: Tensor,
    ba: Tensor,
    rate: Tensor,
    bias: Tensor,
    *,
    states: Tensor,
    heads: DeltaHeads,
    batch: Batch,
) -> Tensor:
    """Token by token; the bits of a sequence depend on nothing else."""
    qkv, ba = qkv.contiguous(), ba.contiguous()
    out = _empty_output(qkv, heads)
    sequences = batch.query_starts.size(0) - 1
    if qkv.size(0):
        _recurrent[(sequences, heads.values, triton.cdiv(heads.value_dim, COLUMNS))](
            *(qkv, ba, rate, bias, states),
            *(batch.state_slots, batch.query_starts, batch.context_tokens),
            *(out, heads.key_dim**-0.5),
            **_constants(heads),
            PADDED_KEY=triton.next_power_of_2(heads.key_dim),
            COLUMNS=COLUMNS,
            enable_fp_fusion=True,
        )
    return out


def chunk_delta_rule(
    qkv: Tensor,
    ba: Tensor,
    rate: Tensor,
    bias: Tensor,
    *,
    states: Tensor,
    heads: DeltaHeads,
    batch: Batch,
) -> Tensor:
    """Chunk by chunk."""
    qkv, ba = qkv.contiguous(), ba.contiguous()
    out = _empty_output(qkv, heads)
    tokens, sequences = qkv.size(0), batch.query_starts.size(0) - 1
    if not tokens:
        return out
    u, w = (
        torch.empty((tokens, heads.values, size), dtype=torch.float32, device=qkv.device)
        for size in (heads.value_dim, heads.key_dim)
    )
    constants = {**_constants(heads), "TOKENS": CHUNK_TOKENS, "BLOCK": BLOCK}
    _solve_chunks[(triton.cdiv(tokens, CHUNK_TOKENS) + sequences, heads.values)](
        *(qkv, ba, rate, bias, batch.query_starts, u, w, sequences),
        PADDED=max(LEAST_PADDED, triton.next_power_of_2(sequences)),
        **constants,
        num_warps=8,
        enable_fp_fusion=True,
    )
    _pass_chunks[(sequences, heads.values, triton.cdiv(heads.value_dim, COLUMNS))](
        *(qkv, ba, rate, bias, u, w, states),
        *(batch.state_slots, batch.query_starts, batch.context_tokens),
        *(out, heads.key_dim**-0.5),
        **constants,
        COLUMNS=COLUMNS,
        num_warps=4,
        num_stages=1,  # a load ahead of its turn would find a state that is not written yet
        enable_fp_fusion=True,
    )
    return out


def _empty_output(qkv: Tensor, heads: DeltaHeads) -> Tensor:
    shape = (qkv.size(0), heads.values, heads.value_dim)
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device)


def _constants(heads: DeltaHeads) -> dict[str, int | bool]:
    return {
        "KEYS": heads.keys,
        "VALUES": heads.values,
        "KEY_DIM": heads.key_dim,
        "VALUE_DIM": heads.value_dim,
        "IS_TILED": heads.is_tiled,
    }
