"""Tells the supervisor how each model's engine stands: soon enough to be true, for next to nothing.

Of a model that works ten times a second, where something has changed; and at once when it has no
work any more, so what was said last of a model at rest is what holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cortex.ipc.messages import EngineReport

SECONDS_BETWEEN = 0.1


class Standing(Protocol):
    """An engine, as far as it is told of."""

    @property
    def model(self) -> str:
        """What it serves."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""

    def standing(self) -> EngineReport:
        """Return how it stands."""


class EngineReports:
    """What was said last of each model, and when."""

    def __init__(self, send: Callable[[EngineReport], None], clock: Callable[[], float]) -> None:
        self._send = send
        self._clock = clock
        self._said: dict[str, EngineReport] = {}
        self._due: dict[str, float] = {}

    def begin(self, engine: Standing) -> None:
        """Note how *engine* stands after its load, of which nobody has to be told."""
        self._said[engine.model] = engine.standing()
        self._due[engine.model] = self._clock()

    def tell(self, engine: Standing) -> None:
        """Tell how *engine* stands, where that is news and it is time for it."""
        now = self._clock()
        if engine.has_work and now < self._due[engine.model]:
            return
        report = engine.standing()
        if report != self._said[engine.model]:
            self._said[engine.model] = report
            self._due[engine.model] = now + SECONDS_BETWEEN
            self._send(report)

    def end(self, model: str) -> None:
        """Forget a model that is gone."""
        del self._said[model], self._due[model]
