"""One row of logits, seen from the sampler: how to choose from it, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cortex.ipc.messages import SamplingParams


class Row(NamedTuple):
    """How to choose from a row, and the position that the chosen token will have.

    ``known`` are the prompt, ``prompt_tokens`` of them, and the answer so far; only penalties look
    at them. ``forced`` is put in instead of what would be chosen.
    """

    sampling: SamplingParams
    position: int
    known: Sequence[int] = ()
    prompt_tokens: int = 0
    forced: int | None = None

    @property
    def answer(self) -> Sequence[int]:
        """The tokens that were generated so far."""
        return self.known[self.prompt_tokens :]

    @property
    def is_adjusted(self) -> bool:
        """Whether the logits to choose from are not those of the model."""
        is_changed = bool(self.sampling.logit_bias) or is_penalised(self.sampling)
        return is_changed and self.forced is None

    @property
    def is_drawn(self) -> bool:
        """Whether chance decides, by the logits of the model."""
        return self.sampling.temperature > 0 and self.forced is None and not self.is_adjusted

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probability of the token is asked for."""
        return self.sampling.top_logprobs is not None


class Chosen(NamedTuple):
    """What came of a row: its token, None where the logits were not finite.

    ``logprob`` is the token's, NaN where it was not asked for; ``top`` are the ids and log
    probabilities of the likeliest tokens, likeliest first.
    """

    token_id: int | None
    logprob: float = math.nan
    top: Sequence[tuple[int, float]] = ()


def is_penalised(sampling: SamplingParams) -> bool:
    """Whether what was said before changes what is likely now."""
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
