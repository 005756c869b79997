"""Bias and penalties, each against its formula."""

import math
from typing import Any

import pytest
import torch

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.penalties import LARGEST, adjust
from cortex.runtime.device.row import Row
from cortex.runtime.device.sampler import sample
from cortex.runtime.device.token_counts import TokenCounts


def row(known: list[int], prompt_tokens: int, **options: Any) -> Row:
    sampling = SamplingParams(temperature=0.0, max_tokens=8, seed=0, **options)
    return Row(sampling, len(known), TokenCounts.of(known, prompt_tokens))


def adjusted(logits: list[float], *rows: Row) -> list[list[float]]:
    """Return what each of *rows* makes of the same logits."""
    changed = torch.tensor([logits] * len(rows), dtype=torch.float64)
    adjust(changed, rows)
    return changed.tolist()


def test_a_bias_is_added_to_its_tokens() -> None:
    biased = row([], 0, logit_bias={0: 1.5, 2: -100.0})

    assert adjusted([1.0, 2.0, 3.0], biased) == [[2.5, 2.0, -97.0]]


def test_the_repetition_penalty_divides_the_positive_and_multiplies_the_negative() -> None:
    repeated = row([0, 1, 1], 3, repetition_penalty=2.0)

    assert adjusted([3.0, -3.0, 3.0, -3.0], repeated) == [[1.5, -6.0, 3.0, -3.0]]


def test_the_repetition_penalty_counts_prompt_and_answer_and_each_token_once() -> None:
    repeated = row([0, 0, 0, 1, 1], 3, repetition_penalty=2.0)

    assert adjusted([8.0, 8.0, 8.0], repeated) == [[4.0, 4.0, 8.0]]


def test_the_frequency_penalty_is_taken_once_for_each_time_in_the_answer() -> None:
    frequent = row([0, 0, 1, 1, 1, 2], 2, frequency_penalty=0.5)

    assert adjusted([5.0, 5.0, 5.0], frequent) == [[5.0, 3.5, 4.5]]


def test_the_presence_penalty_is_taken_once_for_a_token_in_the_answer() -> None:
    present = row([0, 0, 1, 1, 1], 2, presence_penalty=0.5)

    assert adjusted([5.0, 5.0, 5.0], present) == [[5.0, 4.5, 5.0]]


def test_a_negative_penalty_makes_likelier() -> None:
    present = row([0], 0, presence_penalty=-1.0, frequency_penalty=-0.5)

    assert adjusted([5.0, 5.0], present) == [[6.5, 5.0]]


def test_the_bias_comes_before_the_repetition_penalty_and_that_before_the_others() -> None:
    everything = row(
        [0],
        0,
        logit_bias={0: -3.0},
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )

    assert adjusted([1.0], everything) == [[(1.0 - 3.0) * 2.0 - 0.25 - 0.5]]


def test_each_row_has_its_own_penalties() -> None:
    many = [
        row([1], 0, presence_penalty=1.0),
        row([2], 0),
        row([2, 2], 1, repetition_penalty=4.0),
        row([0, 0], 0, frequency_penalty=1.0, logit_bias={1: 1.0}),
    ]

    assert adjusted([8.0, 8.0, 8.0], *many) == [
        [8.0, 7.0, 8.0],
        [8.0, 8.0, 8.0],
        [8.0, 8.0, 2.0],
        [6.0, 9.0, 8.0],
    ]


def test_without_a_temperature_the_likeliest_after_the_penalties_is_taken() -> None:
    logits = torch.tensor([[5.0, 4.9, 0.0]] * 3)
    rows = [row([0], 0), row([0], 0, presence_penalty=0.2), row([], 0, logit_bias={2: 100.0})]

    assert [chosen.token_id for chosen in sample(logits, rows)] == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0])
@pytest.mark.parametrize("largest", [-LARGEST, LARGEST])
def test_the_largest_values_that_are_taken_overflow_nothing(
    temperature: float, largest: float
) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0]])
    sampling = SamplingParams(
        temperature,
        8,
        0,
        repetition_penalty=LARGEST,
        presence_penalty=largest,
        frequency_penalty=largest,
        logit_bias={0: largest, 1: -largest, 2: largest},
    )
    counts = TokenCounts.of([0, 1] * 1000, 1000)

    (chosen,) = sample(logits, [Row(sampling, 0, counts)])

    changed = logits.double()
    adjust(changed, [Row(sampling, 0, counts)])
    assert chosen.token_id == changed.argmax()
    assert all(math.isfinite(x) for x in changed[0].tolist())
