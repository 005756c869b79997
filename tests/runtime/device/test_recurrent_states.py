"""A model with recurrent states says what it would say alone, whoever else was there before.

The fake model's answer tells whether the state of every token was what it has to be: a state in a
wrong slot, a missing or stale copy, a token applied twice would change it.
"""

from __future__ import annotations

import pytest
import torch
from structlog.testing import capture_logs

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.sequence_states import RecurrentStates
from engine_fakes import UNHEALTHY_TOKEN, answer, greedy, vector
from engine_run import Run

HEAD = [7, 3, 5, 2] * 12  # three blocks
SPECIAL = 90


def recurrent(**bounds: object) -> Run:
    return Run(**{"snapshots": 4, **bounds})  # type: ignore[arg-type] # those of Run


def said(run: Run, number: int, prompt: list[int], tokens: int = 8) -> list[int]:
    run.start(number, prompt, greedy(tokens))
    run.until_idle()
    return run.tokens[number]


def snapshots(run: Run) -> int:
    states = run.engine._scheduler._states
    assert isinstance(states, RecurrentStates)
    return states.pool.snapshots


@pytest.mark.parametrize("budget", [1, 3, 16, 20, 512])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_chunks_of_any_length_leave_the_same_state(budget: int, runs_ahead: bool) -> None:
    run = recurrent(budget=budget, seats=1, runs_ahead=runs_ahead)

    assert said(run, 1, [*HEAD, 1], 20) == answer([*HEAD, 1], 20)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_many_at_once_have_a_state_each(runs_ahead: bool) -> None:
    run = recurrent(budget=24, runs_ahead=runs_ahead)
    prompts = {number: [number] * (5 * number) for number in range(1, 9)}
    for number, prompt in prompts.items():
        run.start(number, prompt, greedy(3 * number))
    run.until_idle()

    assert run.tokens == {n: answer(prompt, 3 * n) for n, prompt in prompts.items()}


def test_the_same_prompt_is_continued_from_the_snapshot_at_its_end() -> None:
    run = recurrent()
    said(run, 1, [*HEAD, 1])

    assert said(run, 2, [*HEAD, 1]) == answer([*HEAD, 1], 8)
    assert run.cached == {1: 0, 2: len(HEAD)}


def test_blocks_beyond_the_last_snapshot_are_not_shared() -> None:
    run = recurrent()
    conversation = [*HEAD, *said(run, 1, HEAD, 40), 9]

    assert said(run, 2, conversation) == answer(conversation, 8)
    assert run.cached[2] == len(HEAD) - 16, "all of it is in known blocks, but one snapshot only"


def test_a_snapshot_is_taken_after_the_last_special_token() -> None:
    run = recurrent(special_ids=frozenset({SPECIAL}))
    turns = [*HEAD, SPECIAL, 4, SPECIAL]
    said(run, 1, [*turns, *range(40)])

    assert said(run, 2, [*turns, *range(60, 90)]) == answer([*turns, *range(60, 90)], 8)
    assert run.cached[2] == len(HEAD), "rounded down to a block"


def test_without_a_snapshot_there_nothing_is_shared() -> None:
    run = recurrent()
    said(run, 1, [*HEAD, *range(40)])

    said(run, 2, [*HEAD, *range(60, 90)])

    assert run.cached[2] == 0


def test_a_long_head_is_shared_every_2048_tokens() -> None:
    head = [5, 6, 7, 8] * 1040
    run = recurrent(blocks=800, context=8192)
    said(run, 1, [*head, *range(40)], 1)

    assert said(run, 2, [*head, 1], 3) == answer([*head, 1], 3)
    assert run.cached[2] == 4096


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_long_answer_has_snapshots_too(runs_ahead: bool) -> None:
    run = recurrent(blocks=200, context=4096, runs_ahead=runs_ahead)
    prompt = [3] * 2040
    conversation = [*prompt, *said(run, 1, prompt, 40), 9]

    assert said(run, 2, conversation, 3) == answer(conversation, 3)
    assert run.cached[2] == 2048


def test_steps_run_ahead_but_for_the_one_before_a_snapshot_of_what_is_said() -> None:
    run = recurrent(blocks=200, context=4096, runs_ahead=True)
    run.start(1, [3] * 2040, greedy(40))
    waits = []
    while run.engine.has_work:
        waits.append(run.engine._scheduler.has_to_know)
        run.step()

    assert sum(waits) == 1


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_one_that_was_preempted_goes_on_from_its_best_snapshot(runs_ahead: bool) -> None:
    run = recurrent(blocks=13, seats=2, runs_ahead=runs_ahead)
    prompts = {1: [1] * 20, 2: [2] * 20}
    for number, prompt in prompts.items():
        run.start(number, prompt, greedy(100))
    run.until_idle()

    assert run.engine.standing().preemptions
    assert run.tokens == {number: answer(prompt, 100) for number, prompt in prompts.items()}


def test_the_least_recently_used_snapshot_makes_room() -> None:
    run = recurrent(seats=1, snapshots=2)
    for number, first in enumerate([1, 2, 1, 3], start=1):
        said(run, number, [first, *HEAD])

    assert said(run, 5, [1, *HEAD]) == answer([1, *HEAD], 8)
    assert said(run, 6, [2, *HEAD]) == answer([2, *HEAD], 8)
    assert [run.cached[number] for number in range(1, 7)] == [0, 0, 48, 0, 48, 0]


def test_cleared_prefixes_are_not_found() -> None:
    run = recurrent()
    said(run, 1, [*HEAD, 1])
    assert run.engine.clear_prefix_cache() == 3

    assert said(run, 2, [*HEAD, 1]) == answer([*HEAD, 1], 8)
    assert run.cached[2] == 0


def test_what_an_unhealthy_sequence_computed_is_not_found() -> None:
    run = recurrent()
    said(run, 1, [*HEAD, UNHEALTHY_TOKEN])
    assert run.codes == {1: "unhealthy_logits"}
    assert not snapshots(run)

    assert said(run, 2, [*HEAD, 1]) == answer([*HEAD, 1], 8)
    assert run.cached[2] == 0


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_seat_that_a_cancelled_one_left_begins_anew(runs_ahead: bool) -> None:
    run = recurrent(seats=1, budget=16, runs_ahead=runs_ahead)
    run.start(1, [*HEAD, 1], greedy(50))
    run.step()
    run.engine.cancel(1)
    run.start(2, [9, *HEAD], greedy(8))
    run.until_idle()

    assert run.tokens[2] == answer([9, *HEAD], 8)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_step_that_ran_out_of_memory_half_way_is_not_applied_twice(runs_ahead: bool) -> None:
    run = recurrent(runs_ahead=runs_ahead)
    run.start(1, [*HEAD, 1], greedy(30))
    run.start(2, [*HEAD, 2], greedy(30))
    run.start(3, [*HEAD, 3], greedy(30))
    for _ in range(4):
        run.step()
    run.model.module.errors = [torch.OutOfMemoryError("CUDA out of memory")]
    with capture_logs():
        run.until_idle()

    assert set(run.codes.values()) == {"out_of_memory"}
    for number in set(run.tokens) - set(run.codes):
        assert run.tokens[number] == answer([*HEAD, number], 30)
    assert run.has_all_blocks
    assert runs_ahead or set(run.codes) == {3}


def test_a_step_that_fails_when_it_lands_leaves_no_snapshot_of_one_that_has_ended() -> None:
    run = recurrent(runs_ahead=True)
    run.start(1, [*HEAD, 1], greedy(8))
    run.step()
    run.step()
    assert snapshots(run) == 1
    run.engine.cancel(1)
    run.model.module.errors = [ValueError("a bug")]
    with capture_logs():
        run.step()

    assert not snapshots(run)


def test_a_restored_state_is_there_for_one_that_joined_without_a_token_to_compute() -> None:
    run = recurrent(seats=4, budget=4)
    said(run, 1, [*HEAD, 1, 1, 1])
    for number in range(2, 5):
        run.start(number, [*HEAD, 1, 1, number], greedy(9))
        run.step()
    run.embed(9, [1] * 30)
    run.until_idle()

    for number in range(2, 5):
        assert run.tokens[number] == answer([*HEAD, 1, 1, number], 9)
    assert run.vectors[9] == pytest.approx(vector([1] * 30, "mean"), rel=1e-6)


def test_an_embedding_finds_no_snapshot_and_leaves_none() -> None:
    run = recurrent()
    said(run, 1, [*HEAD, 1])
    run.embed(2, [*HEAD, 1])
    run.until_idle()
    run.embed(3, [9, *HEAD])
    run.until_idle()

    assert run.vectors[2] == pytest.approx(vector([*HEAD, 1], "mean"), rel=1e-6)
    assert snapshots(run) == 1


def test_a_scored_prompt_finds_no_snapshot_and_leaves_none() -> None:
    run = recurrent()
    said(run, 1, [*HEAD, 1])
    scored = SamplingParams(0.0, 4, 0, prompt_logprobs=0)
    run.start(2, [*HEAD, 1], scored)
    run.until_idle()
    run.start(3, [9, *HEAD], scored)
    run.until_idle()

    assert [token for token, _ in run.scores[2]] == [*HEAD[1:], 1]
    assert run.tokens[2] == answer([*HEAD, 1], 4)
    assert run.cached[2] == 0
    assert snapshots(run) == 1


def test_without_a_prefix_cache_there_are_no_snapshots() -> None:
    run = recurrent(options=EngineOptions(prefix_cache=False))
    said(run, 1, [*HEAD, 1])

    assert said(run, 2, [*HEAD, 1]) == answer([*HEAD, 1], 8)
    assert run.cached[2] == 0
    assert not snapshots(run)


def test_nothing_is_drafted() -> None:
    run = recurrent(variety=3)
    prompt = [1, 2, 3] * 8

    assert said(run, 1, prompt, 60) == answer(prompt, 60, variety=3)
    assert not run.drafted
