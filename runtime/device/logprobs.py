"""Log probabilities of a row's token and of its likeliest ones, in the unmodified distribution.

    logprob(i) = x_i - max(x) - log(sum over j of exp(x_j - max(x)))

of the logits x as the model gave them: before masks, bias, penalties, temperature and filters, also
for a token that was put in. The sum is one of whole numbers, in units of 2**-44 of the likeliest
token's share, so that it does not depend on the order of summation; 2**18 tokens make it wrong by
less than 2**-26, less than float32, in which log probabilities travel, tells apart.

The likeliest are ordered by logit, equals by id.

Shapes: R rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cortex.models.kernels.sampling import Scores
from cortex.runtime.device.row import Chosen
from cortex.runtime.device.shares import shares

MOST = 20
"""The most likeliest tokens that may be asked for; OpenAI's limit."""
_UNIT = 2.0**44  # 2**18 shares of one still sum to less than 2**63
_LEAST = torch.finfo(torch.float32).min  # of what a record can hold
_LOWER_BITS = 2**32


def score(logits: Tensor, tokens: Tensor, likeliest: int) -> Scores:
    """Score *tokens*, [R], in *logits*, [R, V] float32, finite, and so many of the *likeliest*."""
    count = min(likeliest, logits.shape[-1])
    ids = tokens[:, None]
    if count:
        ids = torch.cat([ids, _likeliest(logits, count)], dim=-1)  # [R, 1 + K]
    return Scores(
        ids=ids,
        logits=logits.gather(-1, ids),
        totals=shares(logits).mul_(_UNIT).long().sum(dim=-1),
        largest=logits.amax(dim=-1),
    )


def told(scores: Scores, wanted: Sequence[int]) -> list[Chosen]:
    """Return what *scores*, on the host, come to, with *wanted* likeliest of each row."""
    return [_chosen(*row) for row in zip(*(part.tolist() for part in scores), wanted, strict=True)]


def _chosen(ids: list[int], logits: list[float], total: int, largest: float, asked: int) -> Chosen:
    everything = math.log(total / _UNIT) + largest
    logprobs = [max(logit - everything, _LEAST) for logit in logits[: 1 + asked]]
    return Chosen(ids[0], logprobs[0], list(zip(ids[1:], logprobs[1:], strict=False)))


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
