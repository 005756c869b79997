"""Who joins never stalls who runs by more than one chunk; the more urgent go first, in order."""

from __future__ import annotations

import math

import pytest

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Generate
from engine_fakes import answer, greedy
from engine_run import Run

STREAMS = range(1, 9)
BUDGET = 24
LONG = [3, 1, 4, 1, 5] * 100
PLAIN = EngineOptions(speculation=False)


def streaming(*, runs_ahead: bool = False, seats: int = 16, budget: int = BUDGET) -> Run:
    """Return an engine on which eight streams have begun to answer."""
    run = Run(
        blocks=200,
        seats=seats,
        budget=budget,
        context=1000,
        runs_ahead=runs_ahead,
        options=PLAIN,
    )
    for number in STREAMS:
        run.start(number, [number], greedy(800))
    while not all(run.tokens[number] for number in STREAMS):
        run.step()
    return run


def step(run: Run) -> dict[int, int]:
    """Run a step and return how many tokens each sequence was given."""
    before = {number: len(tokens) for number, tokens in run.tokens.items()}
    run.step()
    return {number: len(run.tokens[number]) - count for number, count in before.items()}


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("joining", [1, 3])
def test_every_stream_gets_a_token_in_every_step_while_long_prompts_join(
    joining: int, *, runs_ahead: bool
) -> None:
    run = streaming(runs_ahead=runs_ahead)
    newcomers = range(100, 100 + joining)
    for number in newcomers:
        run.start(number, [number - 90, *LONG], greedy(4))
    steps = 0

    while not all(run.tokens[number] for number in newcomers):
        given = step(run)
        assert [given[number] for number in STREAMS] == [1] * len(STREAMS)
        steps += 1

    chunk = BUDGET - len(STREAMS)
    assert steps <= math.ceil(joining * (len(LONG) + 5) / chunk) + joining + runs_ahead
    assert {n: run.tokens[n] for n in STREAMS} == {
        n: answer([n], len(run.tokens[n])) for n in STREAMS
    }


def test_no_step_is_larger_than_the_budget() -> None:
    run = streaming()
    for number in (100, 101, 102):
        run.start(number, [number - 90, *LONG], greedy(4))
    sizes = []

    while not run.tokens[102]:
        report = run.engine.step()
        sizes.append(report.tokens)
        for record in report.records:
            run._note(record)

    assert max(sizes) == BUDGET
    assert sizes.count(BUDGET) >= len(sizes) - 3, "and what is left of it is used"


def test_prompts_join_in_the_order_they_came() -> None:
    run = streaming()
    for number in (100, 101, 102):
        run.start(number, [number - 90, *LONG], greedy(4))
    began: list[int] = []

    while len(began) < 3:
        given = step(run)
        began += [n for n in (100, 101, 102) if given[n] and n not in began]

    assert began == [100, 101, 102]


def test_the_more_urgent_joins_first_and_no_stream_feels_it() -> None:
    run = streaming()
    run.start(100, [9, *LONG], greedy(4))
    step(run)
    run.engine.start(Generate(0, 101, "m", [10, *LONG], greedy(4), priority=1))
    run.tokens[101], run.logprobs[101], run.tops[101] = [], [], []

    while not run.tokens[101]:
        given = step(run)
        assert [given[number] for number in STREAMS] == [1] * len(STREAMS)

    assert not run.tokens[100]


def test_the_more_urgent_takes_the_seat_of_who_came_last_and_that_one_loses_no_token() -> None:
    run = streaming(seats=8)
    run.engine.start(Generate(0, 101, "m", [10, 11], greedy(4), priority=1))
    run.tokens[101], run.logprobs[101], run.tops[101] = [], [], []

    given = step(run)

    assert [given[number] for number in STREAMS] == [1] * 7 + [0]
    assert given[101] == 1
    run.until_idle()
    assert run.tokens == {
        **{n: answer([n], 800) for n in STREAMS},
        101: answer([10, 11], 4),
    }
