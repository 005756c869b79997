"""A model of a group on a rank that does not lead: it makes the steps that the first rank tells.

It schedules nothing, admits nothing and reports nothing. Its tokens are chosen here as they are on
the first rank, by the same logits, parameters, seeds and masks, because the next step begins with
them, on a GPU before the host has seen them. What the first rank chose comes with a later step and
is compared: a rank that has chosen something else has computed something else, and no token of the
group can be trusted after that.

A step's result is looked at when the next but one is told, as the first rank does: so no more than
two are ever under way. One that the engine gave up, since what came with it failed, is never told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count

from cortex.runtime.device.model_runner import Launched, Runner
from cortex.runtime.device.plan_wire import Kind, PlanListener, ToldStep, with_masks
from cortex.runtime.device.refusal import DeviceLost, RanksDiverged
from cortex.runtime.device.row import tokens_of
from cortex.runtime.device.step_plan import StepPlan
from cortex.runtime.device.step_rows import LateRows, rows_without_masks


class Follower:
    """One model; *runner* makes its steps."""

    def __init__(self, model: str, runner: Runner) -> None:
        self.model = model
        self._runner = runner
        self._listeners: dict[Kind, PlanListener] = {
            "launch": PlanListener(),
            "hidden": PlanListener(),
        }
        self._launches = count()
        self._flights: deque[tuple[int, Launched]] = deque()

    def step(self, told: ToldStep, next_message: Callable[[], bytes]) -> None:
        """Make a step; *next_message* waits for that of its masks. Raise DeviceLost."""
        try:
            self._compare(told.chosen)
            plan = self._listeners[told.kind].plan(told)
            if told.kind == "hidden":
                self._runner.hidden(plan)
            else:
                self._launch(plan, next_message if told.has_masks else None)
        except DeviceLost:
            raise
        except Exception as exc:
            raise DeviceLost(
                f"a step of {self.model} failed here, not on the first rank: "
                f"{type(exc).__name__}: {exc}"
            ) from exc

    def _launch(self, plan: StepPlan, next_message: Callable[[], bytes] | None) -> None:
        rows = rows_without_masks(plan)
        if next_message is None:
            self._note(self._runner.launch(plan, rows))
            return
        late = LateRows(lambda: with_masks(rows, next_message()))
        self._note(self._runner.launch(plan, late))
        late.make_now()  # before the next message

    def _note(self, launched: Launched) -> None:
        self._flights.append((next(self._launches), launched))

    def _compare(self, chosen: list[tuple[int, list[int]]]) -> None:
        for number, tokens in chosen:
            while self._flights[0][0] < number:  # nobody waited for it
                self._flights.popleft()
            found = tokens_of(self._flights.popleft()[1].result())
            if found != tokens:
                raise RanksDiverged(
                    f"ranks diverged in {self.model}: "
                    f"the first rank chose {tokens}, this one {found}"
                )
