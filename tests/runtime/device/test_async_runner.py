"""Steps that are launched one ahead choose what steps one by one would, and nobody looks early."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.async_runner import AsyncRunner
from cortex.runtime.device.cuda import fetch, upload
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import ModelRunner
from cortex.runtime.device.row import Row
from cortex.runtime.device.sequence import UNKNOWN
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from engine_fakes import UNHEALTHY_TOKEN, FakeModel, answer, greedy
from engine_run import Run

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=100, seed=0)


class FakeStream:
    """Copies arrive when they are waited for, and not before: until then they hold nonsense."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._launched = 0

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        self._launched += 1
        number = self._launched
        self.events.append(f"launch {number}")
        arriving = [torch.full_like(tensor, -77) for tensor in tensors]

        @torch.inference_mode()
        def wait() -> list[Tensor]:
            self.events.append(f"wait {number}")
            for copy, tensor in zip(arriving, tensors, strict=True):
                copy.copy_(tensor)
            return arriving

        return wait


def async_runner(stream: FakeStream, blocks: int = 64) -> AsyncRunner:
    model = FakeModel()
    return AsyncRunner(model, model.new_cache(blocks, 16), CPU, fetch=stream.fetch)


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


@pytest.fixture
def runner(stream: FakeStream) -> AsyncRunner:
    return async_runner(stream)


def planned(
    sequence_id: int, token_ids: list[int], first_position: int, *, is_last: bool = True
) -> PlannedSequence:
    """Return what a sequence, whose blocks are its own two, brings to a step."""
    blocks = [2 * sequence_id, 2 * sequence_id + 1]
    return PlannedSequence(sequence_id, token_ids, first_position, blocks, is_last, GREEDY)


def launch(runner: AsyncRunner, *sequences: PlannedSequence) -> Callable[[], list[int | None]]:
    """Launch a step, and return what waits for its tokens."""
    plan = StepPlan(list(sequences))
    rows = [Row(GREEDY, p.end_position) for p in plan.sampled]
    launched = runner.launch(plan, rows)
    return lambda: [chosen.token_id for chosen in launched.result()]


def test_a_launch_waits_for_nothing(stream: FakeStream, runner: AsyncRunner) -> None:
    assert runner.runs_ahead
    tokens = launch(runner, planned(1, [3, 5], 0))
    assert stream.events == ["launch 1"]

    assert tokens() == answer([3, 5], 1)
    assert stream.events == ["launch 1", "wait 1"]


def test_a_token_that_nobody_knows_is_taken_from_the_step_before(
    stream: FakeStream, runner: AsyncRunner
) -> None:
    first = launch(runner, planned(1, [3, 5], 0))
    second = launch(runner, planned(1, [UNKNOWN], 2))
    third = launch(runner, planned(1, [UNKNOWN], 3))
    assert stream.events == ["launch 1", "launch 2", "launch 3"]

    assert [*first(), *second(), *third()] == answer([3, 5], 3)


def test_it_is_that_of_the_same_sequence_whoever_left_joined_or_only_listened(
    runner: AsyncRunner,
) -> None:
    launch(
        runner,
        planned(1, [3], 0),
        planned(4, [2, 2], 0, is_last=False),
        planned(2, [4, 4], 0),
        planned(3, [5, 5, 5], 0),
    )

    tokens = launch(
        runner,
        planned(3, [UNKNOWN], 3),
        planned(4, [6], 2),
        planned(5, [7, 7], 0),
        planned(2, [UNKNOWN], 2),
    )

    third, second = answer([5, 5, 5], 2), answer([4, 4], 2)
    assert tokens() == [third[1], answer([2, 2, 6], 1)[0], answer([7, 7], 1)[0], second[1]]


def test_a_token_after_unhealthy_logits_is_some_token_of_the_vocabulary(
    runner: AsyncRunner,
) -> None:
    unhealthy = launch(runner, planned(1, [UNHEALTHY_TOKEN], 0), planned(2, [4], 0))
    after = launch(runner, planned(1, [UNKNOWN], 1), planned(2, [UNKNOWN], 1))

    assert unhealthy()[0] is None
    assert after() == [answer([UNHEALTHY_TOKEN, 0], 1)[0], answer([4], 2)[1]]


def test_a_step_without_sequences_is_over_at_once(stream: FakeStream, runner: AsyncRunner) -> None:
    assert runner.launch(StepPlan([]), []).result() == []
    assert stream.events == []


@pytest.mark.parametrize("budget", [3, 8, 512])
def test_an_engine_that_runs_ahead_says_what_one_does_that_waits(
    stream: FakeStream, budget: int
) -> None:
    runs = []
    for is_async in (False, True):
        run = Run(blocks=9, budget=budget, seats=4)
        if is_async:
            ahead = async_runner(stream, blocks=9)
            run.engine = Engine("m", ahead, Limits(2048, 4, 9, 0), token_budget=budget)
        for number in range(7):
            sampling = greedy(3 + 5 * number, stop_token_ids=(11, 12))
            run.start(number, [number, 7, 5] * (number + 1), sampling)
        run.until_idle()
        assert run.has_all_blocks
        runs.append((run.tokens, run.finishes))

    assert runs[0] == runs[1]
    at = {event: index for index, event in enumerate(stream.events)}
    launched = len(stream.events) // 2
    assert any(at[f"launch {n + 1}"] < at[f"wait {n}"] for n in range(1, launched))


def test_on_a_cpu_nothing_is_copied_and_nothing_waited_for() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]

    arrived = fetch(tensors)()

    assert [a.data_ptr() for a in arrived] == [t.data_ptr() for t in tensors]
    assert fetch([])() == []
    assert torch.equal(upload([[1, 2], [3, 4]], torch.int32, CPU), torch.tensor([[1, 2], [3, 4]]))


def test_a_runner_that_waits_says_so() -> None:
    model = FakeModel()

    assert not ModelRunner(model, model.new_cache(1, 16), CPU).runs_ahead
