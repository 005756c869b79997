"""Log probabilities are those of the unmodified distribution, whatever was chosen and how."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plain_sampling
from cortex.ipc.messages import SamplingParams
from cortex.ipc.ring import RECORD, Flag
from cortex.runtime.device.row import Chosen, Row
from cortex.runtime.device.sampler import sample

LOGITS = [0.5, 3.0, -2.0, 3.0, 1.0]


def chosen(logits: list[float], *, forced: int | None = None, **options: Any) -> Chosen:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "seed": 0, **options})
    return sample(torch.tensor([logits]), [Row(sampling, 0, forced=forced)])[0]


def test_they_are_not_there_where_nobody_asked() -> None:
    assert math.isnan(chosen(LOGITS).logprob)
    assert chosen(LOGITS).top == ()


def test_the_chosen_tokens_own_is_there_without_any_of_the_likeliest() -> None:
    said = chosen(LOGITS, top_logprobs=0)

    assert said.logprob == pytest.approx(plain_sampling.logprobs(LOGITS)[1], abs=1e-7)
    assert not said.top


def test_the_likeliest_come_in_order_and_equals_by_id() -> None:
    said = chosen(LOGITS, top_logprobs=4)

    assert [token for token, _ in said.top] == [1, 3, 4, 0]
    assert said.top[0][1] == said.logprob


def test_no_more_of_the_likeliest_come_than_there_are_tokens() -> None:
    assert len(chosen(LOGITS, top_logprobs=20).top) == len(LOGITS)


def test_the_two_zeros_are_equals() -> None:
    assert [token for token, _ in chosen([-0.0, 0.0, -0.0], top_logprobs=3).top] == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0},
        {"temperature": 0.7, "top_k": 1, "min_p": 0.9, "top_p": 0.1},
        {"logit_bias": {2: 100.0}},
        {"forced": 2},
    ],
)
def test_nothing_that_changes_the_choice_changes_them(options: dict[str, Any]) -> None:
    said = chosen(LOGITS, top_logprobs=5, **options)

    expected = plain_sampling.logprobs(LOGITS)
    assert said.token_id is not None
    assert said.logprob == pytest.approx(expected[said.token_id], abs=1e-7)
    assert dict(said.top) == pytest.approx(dict(enumerate(expected)), abs=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_none_and_spoils_no_others(bad: float) -> None:
    sampling = SamplingParams(0.0, 8, 0, top_logprobs=2)
    logits = torch.tensor([LOGITS, [bad, *LOGITS[1:]], LOGITS])

    first, second, third = sample(logits, [Row(sampling, 0)] * 3)

    assert second == Chosen(None, second.logprob)
    assert math.isnan(second.logprob)
    assert first == third == chosen(LOGITS, top_logprobs=2)


def test_a_token_that_cannot_be_has_one_that_a_record_holds() -> None:
    said = chosen([3e38, -3e38], top_logprobs=2)

    assert said.logprob == 0.0
    assert RECORD.pack(1, 1, said.top[1][1], Flag.TOP, 2)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60),
    st.integers(0, 20),
)
@settings(max_examples=150, deadline=None)
def test_they_are_the_log_softmax(logits: list[float], count: int) -> None:
    said = chosen(logits, top_logprobs=count)

    expected = plain_sampling.logprobs(logits)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:count]
    assert [token for token, _ in said.top] == order
    assert [value for _, value in said.top] == pytest.approx([expected[i] for i in order], abs=1e-7)
    assert said.logprob == pytest.approx(max(expected), abs=1e-7)


def test_a_large_flat_vocabulary_loses_nothing_in_the_sum() -> None:
    vocabulary = 2**18

    said = chosen([0.0] * vocabulary, top_logprobs=1)

    assert said.logprob == pytest.approx(-math.log(vocabulary), abs=1e-9)
