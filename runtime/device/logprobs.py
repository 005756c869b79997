"""Log probabilities of a row's token and of its likeliest ones, in the unmodified distribution.

    logprob(i) = x_i - max(x) - log(sum over j of exp(x_j - max(x)))

of the logits x as the model gave them: before bias, penalties, temperature and filters, also for a
token that was put in. The sum is one of whole numbers, in units of 2**-44 of the likeliest token's
share, so that it does not depend on the order of summation; 2**18 tokens make it wrong by less than
2**-26, less than float32, in which log probabilities travel, tells apart.

The likeliest are ordered by logit, equals by id.

Shapes: R rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cortex.runtime.device.row import Chosen

MOST = 20
"""The most likeliest tokens that may be asked for; OpenAI's limit."""
_UNIT = 2.0**44  # 2**18 shares of one still sum to less than 2**63
_LEAST = torch.finfo(torch.float32).min  # of what a record can hold
_LOWER_BITS = 2**32


def scored(logits: Tensor, tokens: Tensor, wanted: Sequence[int]) -> list[Chosen]:
    """Score *tokens*, [R], in *logits*, [R, V] float32, finite; with *wanted* likeliest each."""
    count = min(max(wanted), logits.shape[-1])
    ids = tokens[:, None]
    if count:
        ids = torch.cat([ids, _likeliest(logits, count)], dim=-1)  # [R, 1 + K]
    values = (logits.gather(-1, ids).double() - _log_total(logits)).clamp(min=_LEAST)
    rows = zip(ids.tolist(), values.tolist(), wanted, strict=True)
    return [
        Chosen(
            token_id=row_ids[0],
            logprob=row_values[0],
            top=list(zip(row_ids, row_values, strict=True))[1 : asked + 1],
        )
        for row_ids, row_values, asked in rows
    ]


def _log_total(logits: Tensor) -> Tensor:
    """[R, V] -> [R, 1] float64: log(sum(exp(x)))."""
    exact = logits.double()
    largest = exact.amax(dim=-1, keepdim=True)
    shares = (exact - largest).exp_().mul_(_UNIT).long()
    return (shares.sum(dim=-1, keepdim=True).double() / _UNIT).log() + largest


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """[R, V] float32 -> [R, K] ids, largest logit first, the lowest id of equals first.

    A logit's bits, read as a whole number, are in the order of logits once those of negative ones
    are turned round; with the id below them no two are equal, so there is one answer.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0: there is but one zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    keys = ordered * _LOWER_BITS + (_LOWER_BITS - 1 - ids)
    return _LOWER_BITS - 1 - (keys.topk(count).values & (_LOWER_BITS - 1))
