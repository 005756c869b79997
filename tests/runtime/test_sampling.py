"""How the next token is chosen: who has the last word on what."""

from typing import Any

import msgspec
import pytest

from cortex.ipc.errors import InvalidRequest
from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.ipc.node_api import EMBEDDED_MODEL, LoadRequest, SamplingDefaults
from cortex.ipc.openai import ChatCompletionRequest, CompletionRequest, decode_request
from cortex.runtime.sampling import of_choice, operator_sampling, resolve_sampling
from cortex.runtime.text import GenerationDefaults
from fake_node import FakeText

NAMES = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]
OF_MODELS = NAMES[:5]


def asked(**more: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
    return decode_request(msgspec.json.encode(body), ChatCompletionRequest)


def resolved(
    request: ChatCompletionRequest | CompletionRequest,
    operator: SamplingDefaults | None = None,
    model: GenerationDefaults | None = None,
    **more: Any,
) -> SamplingParams:
    text = FakeText(generation=model or GenerationDefaults())
    options: dict[str, Any] = {"room_tokens": 100, **more}
    return resolve_sampling(request, operator=operator or SamplingDefaults(), model=text, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_request_has_the_last_word_then_the_operator(name: str) -> None:
    operator = SamplingDefaults(**{name: 1})
    model = GenerationDefaults(**({name: 1} if name in OF_MODELS else {}))

    assert getattr(
        resolved(asked(**{name: 0.5 if name != "top_k" else 5}), operator, model), name
    ) in (
        0.5,
        5,
    )
    assert getattr(resolved(asked(), operator), name) == 1


@pytest.mark.parametrize("name", OF_MODELS)
def test_where_both_are_silent_the_model_is_asked(name: str) -> None:
    said: dict[str, Any] = {name: 5 if name == "top_k" else 0.25}

    assert getattr(resolved(asked(), model=GenerationDefaults(**said)), name) == said[name]


def test_where_nobody_says_anything_the_temperature_is_0_7_and_nothing_is_filtered() -> None:
    sampling = resolved(asked())

    assert sampling.temperature == 0.7
    neutral = SamplingParams(temperature=0.7, max_tokens=1, seed=1)
    for name in NAMES:
        assert getattr(sampling, name) == getattr(neutral, name)


def test_nothing_is_something_a_request_can_say() -> None:
    operator = SamplingDefaults(temperature=1.0, top_k=5, presence_penalty=1.5)

    sampling = resolved(asked(temperature=0, top_k=-1, presence_penalty=0), operator)

    assert (sampling.temperature, sampling.top_k, sampling.presence_penalty) == (0, 0, 0)


def test_the_embedded_model_is_greedy_unless_its_operator_says_otherwise() -> None:
    assert operator_sampling(LoadRequest(EMBEDDED_MODEL)).temperature == 0
    warm = SamplingDefaults(temperature=1.0)
    assert operator_sampling(LoadRequest(EMBEDDED_MODEL, sampling=warm)) is warm
    assert operator_sampling(LoadRequest("m")) == SamplingDefaults()


def test_token_ids_of_a_request_are_added_to_the_ends_of_the_model() -> None:
    ends = FakeText().stop_token_ids

    assert resolved(asked(stop_token_ids=[7, *ends, 7])).stop_token_ids == (*ends, 7)
    assert resolved(asked(stop_token_ids=[7], ignore_eos=True)).stop_token_ids == (7,)


@pytest.mark.parametrize("more", [{"stop_token_ids": [10**6]}, {"logit_bias": {"1000000": 1}}])
def test_a_token_that_the_model_has_not_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="1000000") as refusal:
        resolved(asked(**more))

    assert refusal.value.param == next(iter(more))


def test_the_rest_goes_as_it_came() -> None:
    budget = ReasoningBudget(5, (), (1,))

    sampling = resolved(
        asked(logit_bias={"5": -100}, logprobs=True, top_logprobs=3, seed=-4),
        reasoning_budget=budget,
    )

    assert (sampling.logit_bias, sampling.top_logprobs) == ({5: -100.0}, 3)
    assert (sampling.seed, sampling.reasoning_budget) == (-4, budget)
    assert resolved(asked()).top_logprobs is None


@pytest.mark.parametrize("seed", [7, -(2**63), 2**63 - 2])
def test_choices_have_seeds_of_their_own_that_follow_from_the_first(seed: int) -> None:
    first = resolved(asked(seed=seed))

    seeds = [of_choice(first, index).seed for index in range(4)]

    assert seeds[:2] == [seed, seed + 1]
    assert len(set(seeds)) == 4
    assert all(-(2**63) <= given < 2**63 for given in seeds)
    assert of_choice(first, 3) == msgspec.structs.replace(first, seed=seeds[3])


def test_choices_without_a_seed_differ_too() -> None:
    first = resolved(asked())

    assert of_choice(first, 1).seed != first.seed
    assert resolved(asked()).seed != first.seed


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_of_no_tokens_nothing_is_chosen(name: str) -> None:
    request = asked(**{name: 0, "logprobs": True, "logit_bias": {"5": 1}})

    assert resolved(request, grammar="x") == SamplingParams(0.0, max_tokens=0, seed=0)


def completion(**more: Any) -> CompletionRequest:
    body = {"model": "m", "prompt": "hi", **more}
    return decode_request(msgspec.json.encode(body), CompletionRequest)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"echo": True, "logprobs": 2}, 2),
        ({"echo": True, "logprobs": 2, "max_tokens": 0}, 2),
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
    ],
)
def test_a_prompt_is_scored_where_it_is_echoed_with_log_probabilities(
    more: dict[str, Any], expected: int | None
) -> None:
    assert resolved(completion(**more)).prompt_logprobs == expected


def test_a_prompt_has_ends_of_its_own_unless_ends_are_ignored() -> None:
    stops = resolved(completion(stop_token_ids=[7]), end_ids=(5, 6)).stop_token_ids

    assert stops[-3:] == (5, 6, 7)
    assert resolved(completion(ignore_eos=True), end_ids=(5, 6)).stop_token_ids == ()
