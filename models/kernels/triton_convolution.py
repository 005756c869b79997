"""The causal convolution of a Gated DeltaNet layer on a GPU, in Triton.

Every token goes by itself, as it needs but a few before it; for the first ones these lie in the
state. What the state keeps is written by a kernel behind it, or, where each sequence has one token,
by the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cortex.models.batch import Batch

CHANNELS = 256
"""Channels that one program convolves."""

LEAST_PADDED = 64
"""Sequences that a step is looked up among at least: with fewer variants, fewer compile late."""


@triton.jit
def _sequence_of(token, starts, sequences, PADDED: tl.constexpr):
    """Return the sequence of a token."""
    s = tl.arange(0, PADDED)
    ends = tl.load(starts + s + 1, mask=s < sequences, other=2147483647)
    return tl.sum((ends <= token).to(tl.int32), 0)


@triton.jit(
    do_not_specialize=["sequences"], do_not_specialize_on_alignment=["slots", "starts", "contexts"]
)
def _convolve(
    x,
    weight,
    kept,
    slots,
    starts,
    contexts,
    y,
    x_stride,
    channels,
    sequences,
    KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    IS_STEP: tl.constexpr,
):
    """Grid (T, ceil(channels / CHANNELS)); where it IS_STEP, token t is all of sequence t."""
    token = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    sequence = token if IS_STEP else _sequence_of(token, starts, sequences, PADDED)
    first = tl.load(starts + sequence)
    goes_on = tl.load(contexts + sequence) > tl.load(starts + sequence + 1) - first
    slot = tl.load(slots + sequence).to(tl.int64)
    before = kept + (slot * channels + channel) * (KERNEL - 1)
    total = tl.zeros((CHANNELS,), tl.float32)
    for j in tl.static_range(KERNEL):
        at = token - (KERNEL - 1) + j
        here = tl.load(
            x + at.to(tl.int64) * x_stride + channel,
            mask=channel < tl.where(at >= first, channels, 0),
            other=0.0,
        ).to(tl.float32)
        if j < KERNEL - 1:
            is_kept = channel < tl.where((at < first) & goes_on, channels, 0)
            seen = tl.load(before + KERNEL - 1 + at - first, mask=is_kept, other=0.0)
            here = tl.where(at < first, seen, here)
            if IS_STEP and j > 0:
                tl.store(before + j - 1, here, mask=mask)
        elif IS_STEP:
            tl.store(before + KERNEL - 2, here, mask=mask)
        total += here * tl.load(weight + channel * KERNEL + j, mask=mask, other=0.0)
    result = (total / (1.0 + tl.exp(-total))).to(y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * channels + channel, result, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts", "contexts"])
def _keep(
    x,
    kept,
    slots,
    starts,
    contexts,
    x_stride,
    channels,
    KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (S, ceil(channels / CHANNELS)): of each sequence the last inputs, oldest first."""
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    goes_on = tl.load(contexts + sequence) > end - first
    slot = tl.load(slots + sequence).to(tl.int64)
    before = kept + (slot * channels + channel) * (KERNEL - 1)
    for j in tl.static_range(KERNEL - 1):
        at = end - (KERNEL - 1) + j
        here = tl.load(
            x + at.to(tl.int64) * x_stride + channel,
            mask=channel < tl.where(at >= first, channels, 0),
            other=0.0,
        ).to(tl.float32)
        is_kept = channel < tl.where((at < first) & goes_on, channels, 0)
        seen = tl.load(before + KERNEL - 1 + at - first, mask=is_kept, other=0.0)
        tl.store(
            before + j,
            tl.where(at < first, seen, here),
            mask=channel < tl.where(end > first, channels, 0),
        )


def causal_convolution(x: Tensor, weight: Tensor, kept: Tensor, batch: Batch) -> Tensor:
    """X [T, C], whose rows may lie apart -> [T, C]; *kept* is [slots, C, kernel - 1] float32."""
    (tokens, channels), kernel = x.shape, weight.size(1)
    y = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    sequences = batch.query_starts.size(0) - 1
    where = (batch.state_slots, batch.query_starts, batch.context_tokens)
    is_step = tokens == sequences
    if not tokens:
        return y
    blocks = triton.cdiv(channels, CHANNELS)
    _convolve[(tokens, blocks)](
        *(x, weight, kept, *where, y, x.stride(0), channels, sequences),
        KERNEL=kernel,
        CHANNELS=CHANNELS,
        PADDED=1 if is_step else max(LEAST_PADDED, triton.next_power_of_2(sequences)),
        IS_STEP=is_step,
        enable_fp_fusion=True,
    )
    if not is_step:
        _keep[(sequences, blocks)](
            *(x, kept, *where, x.stride(0), channels),
            KERNEL=kernel,
            CHANNELS=CHANNELS,
            enable_fp_fusion=True,
        )
    return y
