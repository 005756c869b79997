"""How the next token is chosen: the request, then the operator, then the model, then 0.7.

The embedded model answers at temperature 0 unless told otherwise: it is small, and its answers at
any other temperature are not what one wants to see first.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from cortex.ipc.errors import ContextLengthExceeded, InvalidRequest, PromptTooLongForMemory
from cortex.ipc.messages import ReasoningBudget, SamplingParams
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

    @property
    def min_p(self) -> float | None:
        """0 is off."""

    @property
    def repetition_penalty(self) -> float | None:
        """1 is off."""


class ModelSampling(Protocol):
    """What a model's text side says of sampling."""

    @property
    def generation(self) -> ModelDefaults:
        """What the checkpoint recommends."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""


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
    model: ModelSampling,
    room_tokens: int,
    end_ids: Sequence[int] = (),
    reasoning_budget: ReasoningBudget | None = None,
    grammar: str | None = None,
) -> SamplingParams:
    """Return how to sample the first choice; raise InvalidRequest.

    The answer never runs over *room_tokens*: what is asked for beyond is cut, as clients that ask
    for 32,000 tokens of every model expect. *end_ids* end it too, as the model's own ends do.
    """
    if len(asked.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings are taken", param="stop")
    stops, bias = asked.stop_token_ids or [], asked.logit_bias or {}
    refuse_unknown_tokens(stops, model.vocab_size, "stop_token_ids")
    refuse_unknown_tokens(list(bias), model.vocab_size, "logit_bias")
    ends = () if asked.ignore_eos else (*model.stop_token_ids, *end_ids)
    is_echoed = isinstance(asked, CompletionRequest) and asked.echo
    prompt_logprobs = asked.wanted_logprobs if is_echoed else None
    limit = limit_of(asked)
    if limit == 0:  # nothing is chosen, so nothing has to be known of how
        return SamplingParams(0.0, max_tokens=0, seed=0, prompt_logprobs=prompt_logprobs)
    return SamplingParams(
        max_tokens=room_tokens if limit is None else min(limit, room_tokens),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        logit_bias=bias,
        stop_token_ids=tuple(dict.fromkeys((*ends, *stops))),
        top_logprobs=asked.wanted_logprobs,
        prompt_logprobs=prompt_logprobs,
        reasoning_budget=reasoning_budget,
        grammar=grammar,
        **_settled(asked, operator, model.generation),
    )


def limit_of(asked: ChatCompletionRequest | CompletionRequest) -> int | None:
    """Return how many tokens an answer may have by the request; None where it does not say."""
    if asked.limit_tokens is None and isinstance(asked, CompletionRequest):
        return COMPLETION_MAX_TOKENS
    return asked.limit_tokens


def _settled(
    asked: ChatCompletionRequest | CompletionRequest,
    operator: SamplingDefaults,
    model: ModelDefaults,
) -> dict[str, Any]:
    """Return what the request, the operator or the model says, in this order."""
    recommended = {
        "temperature": model.temperature,
        "top_p": model.top_p,
        "top_k": model.top_k,
        "min_p": model.min_p,
        "repetition_penalty": model.repetition_penalty,
    }
    neutral = {
        "temperature": DEFAULT_TEMPERATURE,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    settled: dict[str, Any] = {}
    for name, last in neutral.items():
        said = (getattr(asked, name), getattr(operator, name), recommended.get(name), last)
        settled[name] = next(value for value in said if value is not None)
    settled["top_k"] = max(0, int(settled["top_k"]))  # -1 is how vLLM's clients switch it off
    return settled


def of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return how to sample the choice *index*: with a seed of its own, from that of the first."""
    if index == 0:
        return sampling
    seed = (sampling.seed + index + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)


def refuse_unknown_tokens(token_ids: Sequence[int], vocab_size: int, place: str) -> None:
    """Raise InvalidRequest for an id that the vocabulary has not."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"{place} has the token id {largest}, and the model's end at {vocab_size - 1}",
            param=place,
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
