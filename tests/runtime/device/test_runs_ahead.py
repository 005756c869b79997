"""On a device that goes on by itself the next step is launched before the last one has told."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.ipc.ring import Flag
from engine_fakes import UNHEALTHY_TOKEN, answer, greedy
from engine_run import LateRunner, Run

PLAIN = EngineOptions(speculation=False)


def ahead(**options: Any) -> Run:
    return Run(runs_ahead=True, **{"options": PLAIN, **options})


def launches(run: Run) -> int:
    assert isinstance(run.engine._runner, LateRunner)
    return len(run.engine._runner.launches)


def test_a_step_is_launched_before_the_one_before_has_landed() -> None:
    run = ahead()
    run.start(1, [1, 2, 3], greedy(8))
    run.step()
    assert run.tokens[1] == []

    run.step()

    assert run.tokens[1] == answer([1, 2, 3], 1)
    assert launches(run) == 2


def test_every_step_but_the_last_has_another_behind_it() -> None:
    run = ahead()
    run.start(1, [1, 2, 3], greedy(20))
    run.step()
    for number in range(2, 21):
        run.step()
        assert (launches(run), len(run.tokens[1])) == (number, number - 1)


def test_many_say_what_they_would_say_alone() -> None:
    run = ahead(blocks=24, seats=3, budget=7)
    prompts = {n: [n] * (7 * n) for n in range(1, 7)}
    for number, prompt in prompts.items():
        run.start(number, prompt, greedy(30))
        run.step()
    run.until_idle()

    assert run.tokens == {n: answer(prompt, 30) for n, prompt in prompts.items()}
    assert run.has_all_blocks


def test_no_step_is_launched_for_a_sequence_whose_last_token_is_due() -> None:
    run = ahead()
    run.start(1, [1, 2, 3], greedy(5))
    run.until_idle()

    assert run.tokens[1] == answer([1, 2, 3], 5)
    assert launches(run) == 5


def test_a_stop_token_is_the_last_one_told() -> None:
    run = ahead()
    said = answer([1, 2, 3], 9)
    run.start(1, [1, 2, 3], greedy(30, (said[4],)))
    run.until_idle()

    assert run.tokens[1] == said[: said.index(said[4]) + 1]
    assert run.finishes == {1: Flag.STOP}
    assert run.has_all_blocks


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 0.4},
        {"reasoning_budget": ReasoningBudget(3, (), (11, 12))},
        {"temperature": 1.0, "top_logprobs": 2},
    ],
)
@pytest.mark.parametrize("options", [PLAIN, EngineOptions()])
def test_what_was_said_before_is_known_where_it_matters(
    asked: dict[str, Any], options: EngineOptions
) -> None:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 30, "seed": 4, **asked})
    said = []
    for runs_ahead in (True, False):
        run = Run(runs_ahead=runs_ahead, variety=5, options=options)
        for number in (1, 2):
            run.start(number, [1, 2] * 5, sampling if number == 1 else greedy(40))
        run.until_idle()
        said.append((run.tokens, repr(run.logprobs), run.tops, run.finishes))

    assert said[0] == said[1]


def test_a_cancelled_sequence_says_nothing_that_was_due() -> None:
    run = ahead()
    run.start(1, [1, 2, 3], greedy(8))
    run.start(2, [4, 5], greedy(8))
    for _ in range(3):
        run.step()

    assert run.engine.cancel(1)
    before = list(run.tokens[1])
    run.until_idle()

    assert run.tokens == {1: before, 2: answer([4, 5], 8)}
    assert run.has_all_blocks


def test_a_preempted_sequence_waits_for_the_token_that_is_due() -> None:
    run = ahead(blocks=10, seats=2)
    for number in (1, 2):
        run.start(number, [number] * 16, greedy(140))
    run.until_idle()

    assert run.engine._scheduler.preemptions
    assert [run.tokens[n] for n in (1, 2)] == [answer([n] * 16, 140) for n in (1, 2)]


def test_an_unhealthy_sequence_ends_alone() -> None:
    run = ahead()
    run.start(1, [1, UNHEALTHY_TOKEN], greedy(8))
    run.start(2, [4, 5], greedy(8))
    run.until_idle()

    assert run.codes == {1: "unhealthy_logits"}
    assert run.tokens[2] == answer([4, 5], 8)
    assert run.has_all_blocks


def test_a_step_that_fails_when_it_lands_ends_those_in_it() -> None:
    run = ahead()
    run.start(1, [1, 2, 3], greedy(8))
    run.step()
    run.start(2, [4, 5], greedy(8))
    run.model.module.errors = [ValueError("a bug")]
    run.until_idle()

    assert run.codes == {1: "step_failed"}
    assert run.tokens[2] == answer([4, 5], 8)
    assert run.has_all_blocks


def test_memory_that_runs_out_in_a_launched_step_ends_all_in_it() -> None:
    run = ahead()
    run.start(1, [1, 2, 3], greedy(8))
    run.start(2, [4, 5], greedy(8))
    run.step()
    run.model.module.errors = [MemoryError()]
    run.until_idle()

    assert run.codes == {1: "out_of_memory", 2: "out_of_memory"}
    assert run.has_all_blocks
