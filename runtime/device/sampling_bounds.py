"""What no request that was checked can hold: sampling parameters that the sampler cannot follow.

HTTP has refused all of it before, in words for its clients; behind this last line nothing divides
by zero, overflows or points outside the vocabulary. A NaN is out of every range.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.runtime.device.logprobs import MOST
from cortex.runtime.device.penalties import LARGEST
from cortex.runtime.device.refusal import Refused


def refuse_bad_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise Refused for the first parameter that is out of range."""
    s = sampling
    bounds = {
        "temperature": 0 <= s.temperature < math.inf,
        "max_tokens": s.max_tokens >= 0,
        "top_p": 0 < s.top_p <= 1,
        "top_k": s.top_k >= 0,
        "min_p": 0 <= s.min_p <= 1,
        "repetition_penalty": 1 / LARGEST <= s.repetition_penalty <= LARGEST,
        "presence_penalty": abs(s.presence_penalty) <= LARGEST,
        "frequency_penalty": abs(s.frequency_penalty) <= LARGEST,
        "top_logprobs": s.top_logprobs is None or 0 <= s.top_logprobs <= MOST,
        "prompt_logprobs": s.prompt_logprobs is None or 0 <= s.prompt_logprobs <= MOST,
    }
    for name, holds in bounds.items():
        if not holds:
            _refuse(f"{name} is {getattr(s, name)}, which is out of range")
    for token_id, bias in s.logit_bias.items():
        if not abs(bias) <= LARGEST:
            _refuse(f"the logit_bias of token {token_id} is {bias}, which is out of range")
    _refuse_other_tokens("logit_bias", s.logit_bias, vocab_size)
    if s.reasoning_budget is not None:
        _refuse_bad_budget(s.reasoning_budget, vocab_size)


def _refuse_bad_budget(budget: ReasoningBudget, vocab_size: int) -> None:
    if budget.max_tokens < 0:
        _refuse(f"reasoning_budget is {budget.max_tokens}, which is out of range")
    if not budget.end_token_ids:
        _refuse("reasoning_budget names no tokens that end the block")
    marks = *budget.start_token_ids, *budget.end_token_ids
    _refuse_other_tokens("reasoning_budget", marks, vocab_size)


def _refuse_other_tokens(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise Refused(
                "token_out_of_range",
                f"{name} names token {token_id}; token ids go from 0 to {vocab_size - 1}",
            )


def _refuse(detail: str) -> None:
    raise Refused("invalid_sampling", detail)
