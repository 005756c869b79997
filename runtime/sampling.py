"""How the next token is chosen: the request, then the operator, then the model, then 0.7.

The embedded model answers at temperature 0 unless told otherwise: it is small, and its answers at
any other temperature are not what one wants to see first.
"""

from __future__ import annotations

import secrets
from typing import Protocol

from cortex.ipc.errors import ContextLengthExceeded, InvalidRequest, PromptTooLongForMemory
from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import EMBEDDED_MODEL, LoadRequest, SamplingDefaults
from cortex.ipc.openai import ChatCompletionRequest, CompletionRequest

MAX_STOP_STRINGS = 16
DEFAULT_TEMPERATURE = 0.7
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for text completions."""


class ModelDefaults(Protocol):
    """What a checkpoint's generation_config says; None where it is silent."""

    @property
    def temperature(self) -> float | None:
        """0 is greedy."""

    @property
    def top_p(self) -> float | None:
        """1 is off."""

    @property
    def top_k(self) -> int | None:
        """0 is off."""


EMBEDDED_DEFAULTS = SamplingDefaults(temperature=0.0)


def operator_sampling(request: LoadRequest) -> SamplingDefaults:
    """Return what the operator set for the model."""
    if request.sampling is not None:
        return request.sampling
    return EMBEDDED_DEFAULTS if request.model_id == EMBEDDED_MODEL else SamplingDefaults()


def resolve_sampling(
    asked: ChatCompletionRequest | CompletionRequest,
    *,
    operator: SamplingDefaults,
    model: ModelDefaults,
    stop_token_ids: tuple[int, ...],
    room_tokens: int,
) -> SamplingParams:
    """Return how to sample; raise InvalidRequest.

    The answer never runs over *room_tokens*: what is asked for beyond is cut, as clients that ask
    for 32,000 tokens of every model expect.
    """
    if len(asked.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings are taken", param="stop")
    temperature = _first(
        asked.temperature, operator.temperature, model.temperature, DEFAULT_TEMPERATURE
    )
    top_k = _first(asked.top_k, operator.top_k, model.top_k, 0)
    limit = asked.limit_tokens
    if limit is None:
        limit = COMPLETION_MAX_TOKENS if isinstance(asked, CompletionRequest) else room_tokens
    return SamplingParams(
        temperature=temperature,
        max_tokens=min(limit, room_tokens),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        top_p=_first(asked.top_p, operator.top_p, model.top_p, 1.0),
        top_k=max(0, int(top_k)),  # -1 is how vLLM's clients switch it off
        stop_token_ids=() if asked.ignore_eos else stop_token_ids,
    )


def room_for_answer(prompt_tokens: int, context_tokens: int, cache_tokens: int) -> int:
    """Return how many tokens an answer may have.

    Raise ContextLengthExceeded, or PromptTooLongForMemory where the prompt fits the context and can
    never fit the KV cache.
    """
    if prompt_tokens >= context_tokens:
        raise ContextLengthExceeded.of(prompt_tokens, context_tokens)
    if prompt_tokens >= cache_tokens:
        raise PromptTooLongForMemory(
            f"the prompt has {prompt_tokens} tokens, and the KV cache holds {cache_tokens}",
            param="messages",
            extras={"prompt_tokens": prompt_tokens, "cache_tokens": cache_tokens},
        )
    return min(context_tokens, cache_tokens) - prompt_tokens


def _first(*values: float | None) -> float:
    """Return the first that is set; the last always is."""
    return next(value for value in values if value is not None)
