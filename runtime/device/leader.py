"""The runner of a group's first rank: tells every step to the others before it computes it.

    this rank                                          the others (``follower.py``)
    engine: launch(plan, rows)
      tell the plan        ── plan ring ──►            the same plan, rows and seeds
      forward pass         ◄─ collectives ──►          forward pass
      the sampler looks at its rows
        tell the masks     ── plan ring ──►            the same masks
      choose                                           choose: the same logits, so the same tokens
    engine: result()
      with the next step: what was chosen ──►          compare

From the moment that a plan is told, the others compute it. Whatever then goes wrong here, an
exhausted memory included, leaves them in the middle of a step that this rank does not take part in:
it is the end of the whole group, so it is raised as DeviceLost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from cortex.ipc.plan_ring import PlanRingFull
from cortex.runtime.device.model_runner import Launched, Runner
from cortex.runtime.device.plan_wire import (
    Kind,
    PlanTeller,
    ToldStep,
    encode_masks,
    encode_step,
)
from cortex.runtime.device.refusal import DeviceLost, PeerLost
from cortex.runtime.device.row import Chosen, Row, tokens_of
from cortex.runtime.device.step_plan import StepPlan
from cortex.runtime.device.step_rows import LateRows

Broadcast = Callable[[bytes], None]
"""Write a message for all other ranks; raise PlanRingFull."""


@dataclass(frozen=True, slots=True)
class ToldLaunch:
    """A step that goes on, on all ranks; what it chooses is noted for the next one."""

    number: int
    launched: Launched
    landed: list[tuple[int, list[int]]]

    def result(self) -> list[Chosen]:
        """Wait for it, and return what each row chose."""
        with _fatal():
            chosen = self.launched.result()
        self.landed.append((self.number, tokens_of(chosen)))
        return chosen


class Leader:
    """A ``Runner`` whose steps all ranks of the group make; *runner* makes them here."""

    def __init__(self, model: str, runner: Runner, broadcast: Broadcast) -> None:
        self._model = model
        self._runner = runner
        self._broadcast = broadcast
        self._tellers: dict[Kind, PlanTeller] = {"launch": PlanTeller(), "hidden": PlanTeller()}
        self._launches = count()
        self._landed: list[tuple[int, list[int]]] = []  # and not told yet

    @property
    def vocab_size(self) -> int:
        """V; token ids are below it."""
        return self._runner.vocab_size

    @property
    def runs_ahead(self) -> bool:
        """Whether a step goes on after its launch."""
        return self._runner.runs_ahead

    def launch(self, plan: StepPlan, rows: Sequence[Row]) -> Launched:
        """Tell *plan*, which may be empty, and begin it here."""
        if not (plan.sequences or plan.restores or plan.snapshots):
            return self._runner.launch(plan, rows)
        with _fatal():
            if not isinstance(rows, LateRows):
                self._tell("launch", plan)
                return self._noted(self._runner.launch(plan, rows))
            self._tell("launch", plan, has_masks=True)
            telling = LateRows(lambda: self._with_masks_told(rows))
            launched = self._runner.launch(plan, telling)
            telling.make_now()  # before the next message
            return self._noted(launched)

    def hidden(self, plan: StepPlan) -> Tensor:
        """Tell *plan*, and compute it here -> [T, H] float32."""
        with _fatal():
            self._tell("hidden", plan)
            return self._runner.hidden(plan)

    def _tell(self, kind: Kind, plan: StepPlan, *, has_masks: bool = False) -> None:
        told = ToldStep(
            model=self._model,
            kind=kind,
            sequences=self._tellers[kind].tell(plan),
            restores=plan.restores,
            snapshots=plan.snapshots,
            has_masks=has_masks,
            chosen=self._landed,
        )
        self._broadcast(encode_step(told))
        self._landed.clear()

    def _noted(self, launched: Launched) -> ToldLaunch:
        return ToldLaunch(next(self._launches), launched, self._landed)

    def _with_masks_told(self, rows: Sequence[Row]) -> list[Row]:
        made = list(rows)
        self._broadcast(encode_masks(made))
        return made


@contextmanager
def _fatal() -> Iterator[None]:
    try:
        yield
    except DeviceLost:
        raise
    except PlanRingFull as exc:
        raise PeerLost(str(exc)) from exc
    except Exception as exc:
        raise DeviceLost(
            f"a step that other ranks had begun failed here: {type(exc).__name__}: {exc}"
        ) from exc
