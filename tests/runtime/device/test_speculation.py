"""Drafts change when tokens come, never which; they are tried where they pay."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.ipc.ring import Flag
from cortex.runtime.device.drafts import COSTS, LONGEST_DRAFT, Costs, Drafter
from engine_run import Run

ALWAYS_THREE = SamplingParams(0.0, 40, 0, logit_bias={3: 1000.0})


def drafts(text: list[int], price: float = 0.25, step: float = 0.0) -> list[int]:
    drafter = Drafter()
    for length in range(1, len(text) + 1):
        drafter.note(text[:length])
    return drafter.draft(Costs(step, price), LONGEST_DRAFT)


def test_what_followed_the_last_tokens_before_is_the_draft() -> None:
    assert drafts([1, 2, 3, 4, 5, 9, 1, 2, 3], price=0.01)[:6] == [4, 5, 9, 1, 2, 3]


def test_a_text_that_goes_round_is_guessed_to_go_on() -> None:
    assert drafts([9, 1, 2, 1, 2, 1, 2], price=0.01)[:6] == [1, 2, 1, 2, 1, 2]


def test_the_longest_and_then_the_latest_match_counts() -> None:
    assert drafts([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], price=0.01)[0] == 7
    assert drafts([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], price=0.01)[0] == 8


def test_without_a_match_there_is_no_draft() -> None:
    assert drafts([1, 2, 3, 4, 5]) == []


def test_a_guess_that_is_dear_is_shorter() -> None:
    text = [1] * 18

    lengths = [len(drafts(text, price)) for price in (0.05, 0.7, 0.9, 1.0)]

    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == LONGEST_DRAFT
    assert lengths[-1] == 0


def test_wrong_guesses_make_it_stop_and_right_ones_begin_again() -> None:
    drafter, text = Drafter(), []
    for other in range(3, 60):  # the same pair, followed by something else each time
        for token in (other, 1, 2):
            text.append(token)
            drafter.note(text)
    assert drafter.likelihood < 2 / 3, "of three guesses one is wrong"
    assert drafter.draft(Costs(0.0, 0.7), 8) == []

    for _ in range(30):
        text.append(1)
        drafter.note(text)

    assert drafter.draft(Costs(0.0, 0.25), 8) == [1] * 8


def test_a_row_costs_more_the_more_rows_share_a_step() -> None:
    prices = [Costs(0.0, 0.25).price(rows).row for rows in (1, 2, 8, 32)]

    assert prices[0] == 0.25
    assert prices == sorted(prices)
    assert prices[-1] < 1


def test_what_any_draft_costs_is_shared_by_a_longer_step() -> None:
    prices = [COSTS["cuda"].price(rows).step for rows in (1, 8, 64)]

    assert prices[0] == COSTS["cuda"].step
    assert prices == sorted(prices, reverse=True)


def test_where_any_draft_costs_a_step_only_a_long_likely_one_is_tried() -> None:
    assert drafts([1] * 8, price=0.02)
    assert drafts([1] * 4, price=0.02, step=1.5) == []
    assert drafts([1] * 18, price=0.02, step=1.5)


def test_a_sequence_that_repeats_itself_takes_fewer_steps_than_tokens() -> None:
    run = Run()
    run.start(1, [5], ALWAYS_THREE)
    run.until_idle()

    assert run.tokens[1] == [3] * 40
    assert run.accepted > 20
    assert run.steps < 20


def test_drafts_that_are_sometimes_wrong_change_nothing() -> None:
    said = {}
    for speculation in (True, False):
        run = Run(variety=7, options=EngineOptions(speculation=speculation))
        for number in range(1, 5):
            run.start(number, [number, 1, 0] * number, SamplingParams(0.05, 60, number))
            run.until_idle()
        said[speculation] = run.tokens
        assert (0 < run.accepted < run.drafted) == speculation
        assert run.has_all_blocks

    assert said[True] == said[False]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0, "top_logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "logit_bias": {1: 3.0}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3},
        {"reasoning_budget": ReasoningBudget(3, (), (11, 12))},
        {"stop_token_ids": (2,)},
    ],
)
def test_sampled_output_is_the_same_with_and_without_drafts(asked: dict[str, Any]) -> None:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 50, "seed": 4, **asked})
    said = []
    for speculation in (True, False):
        run = Run(variety=3, options=EngineOptions(speculation=speculation))
        for number in (1, 2):
            run.start(number, [1, 2] * 5, sampling)
        run.until_idle()
        said.append((run.tokens, repr(run.logprobs), run.tops, run.finishes))

    assert said[0] == said[1]


def test_a_stop_token_in_a_draft_ends_the_sequence_there() -> None:
    run = Run()
    sampling = SamplingParams(0.0, 40, 0, stop_token_ids=(4,), logit_bias={3: 1000.0})
    text = [3, 3, 3, 3, 4] * 3
    run.start(1, text, sampling)
    run.until_idle()

    assert run.tokens[1][-1] == 3
    assert run.finishes[1] == Flag.LENGTH


def test_no_more_tokens_come_than_were_asked_for() -> None:
    for most in range(1, 20):
        run = Run()
        run.start(1, [5], SamplingParams(0.0, most, 0, logit_bias={3: 1000.0}))
        run.until_idle()
        assert run.tokens[1] == [3] * most


def test_nobody_is_preempted_for_a_draft() -> None:
    run = Run(blocks=4, context=64)
    for number in (1, 2):
        run.start(number, [number] * 8, SamplingParams(0.0, 24, 0, logit_bias={3: 1000.0}))
    run.until_idle()

    assert run.accepted
    assert run.engine._scheduler.preemptions == 0
    assert run.tokens == {1: [3] * 24, 2: [3] * 24}


def test_a_prompt_that_joins_is_not_held_up_by_drafts() -> None:
    run = Run(budget=16)
    run.start(1, [5], ALWAYS_THREE)
    for _ in range(8):
        run.step()
    run.start(2, [1] * 40)

    plan = run.engine._scheduler.schedule()

    assert [(p.sequence_id, len(p.token_ids), p.drafts) for p in plan.sequences] == [
        (1, 1, 0),
        (2, 15, 0),
    ]
