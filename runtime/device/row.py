"""One row of logits, seen from the sampler: how to choose from it, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from cortex.ipc.messages import SamplingParams

if TYPE_CHECKING:  # the scheduler needs this file, and no torch
    from torch import Tensor

    from cortex.runtime.device.token_counts import TokenCounts


class Row(NamedTuple):
    """How to choose from a row, and the position that the chosen token will have.

    ``counts`` are the tokens known so far; only penalties look at them, and have to have them.
    ``forced`` is put in instead of what would be chosen. ``allowed`` are the tokens that may be
    chosen, a bit each, int32 [ceil(V / 32)] on the host, with token i at bit i % 32 of word
    i // 32; None where all are.
    """

    sampling: SamplingParams
    position: int
    counts: TokenCounts | None = None
    forced: int | None = None
    allowed: Tensor | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the logits to choose from are not those of the model."""
        sampling = self.sampling
        is_free = self.allowed is None and not sampling.logit_bias and not is_penalised(sampling)
        return not is_free and self.forced is None

    @property
    def is_drawn(self) -> bool:
        """Whether chance decides, by the logits of the model."""
        return self.sampling.temperature > 0 and self.forced is None and not self.is_changed

    @property
    def is_likeliest(self) -> bool:
        """Whether all that is asked for is the likeliest token by the logits of the model."""
        is_greedy = self.sampling.temperature == 0 and self.forced is None
        return is_greedy and not self.is_changed and not self.wants_logprobs

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probability of the token is asked for."""
        return self.sampling.top_logprobs is not None


class Chosen(NamedTuple):
    """What came of a row: its token, None where the logits were not finite or nothing was allowed.

    The second of these ``is_stuck``. ``logprob`` is the token's, NaN where it was not asked for;
    ``top`` are the ids and log probabilities of the likeliest tokens, likeliest first.
    """

    token_id: int | None
    logprob: float = math.nan
    top: Sequence[tuple[int, float]] = ()
    is_stuck: bool = False


def tokens_of(chosen: Sequence[Chosen]) -> list[int]:
    """Return the token of each, below 0 where there is none: what all ranks must agree on."""
    return [-1 - one.is_stuck if one.token_id is None else one.token_id for one in chosen]


def is_penalised(sampling: SamplingParams) -> bool:
    """Whether what was said before changes what is likely now."""
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
