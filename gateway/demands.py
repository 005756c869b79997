"""A model that somebody waits for, from the first who asks to loaded or failed.

phase      what goes on
asking     nodes are asked what it needs
waiting    for its turn: for memory that others have now
clearing   what has to go is being unloaded
loading    its node loads it

It belongs to the daemon, not to the request that asked first: everybody who wants the model waits
for the same one. Who goes away stops waiting; once it is being loaded it goes on without them, and
before that it is dropped when nobody waits any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cortex.gateway.catalogue import Target
from cortex.gateway.fleet import Node
from cortex.gateway.placement import Incoming, Need
from cortex.ipc.errors import ApiError, ModelLoading
from cortex.ipc.fleet_api import LoadPhase
from cortex.ipc.node_api import Progress

BACK_OFF_SECONDS = 3.0
RETRY_SECONDS = 5
LONGEST_RETRY_SECONDS = 60


class Demand:
    """Over when ``finished`` is set; ``error`` tells how. ``memory_queue.py`` alone changes it."""

    def __init__(
        self, target: Target, since: float, *, only: str | None = None, may_evict: bool = True
    ) -> None:
        self.target = target
        self.since = since
        self.only = only
        self.may_evict = may_evict
        self.is_asked = False
        """Whether an operator wants it, who need not wait."""
        self.phase: LoadPhase = "asking"
        self.node: Node | None = None
        self.why: str | None = None
        self.progress: Progress | None = None
        self.waiting = 0
        self.needs: dict[str, Need] = {}
        self.excluded: set[str] = set()
        self.attempts = 0
        self.setback: ApiError | None = None
        """What the last attempt failed with."""
        self.finished = asyncio.Event()
        self.error: ApiError | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a node is at work for it."""
        return self.phase in ("clearing", "loading")

    @property
    def is_wanted(self) -> bool:
        """Whether anybody would miss it."""
        return self.waiting > 0 or self.is_asked

    async def over(
        self, heartbeat: Heartbeat, keep_alive_seconds: float, until: float | None
    ) -> None:
        """Return when it has ended, well or not, with a heartbeat after each time of silence.

        Raise ModelLoading where that has not come *until* then, by the event loop's clock.
        """
        loop = asyncio.get_running_loop()
        while not self.finished.is_set():
            seconds = keep_alive_seconds
            if until is not None:
                seconds = min(seconds, until - loop.time())
            if seconds <= 0:
                raise self.later()
            try:
                async with asyncio.timeout(seconds):
                    await self.finished.wait()
            except TimeoutError:
                await heartbeat(self)

    def incoming(self) -> Incoming:
        """Return what placement has to know."""
        assert self.target.profile is not None
        return Incoming(
            self.target,
            self.target.profile,
            dict(self.needs),
            self.since,
            frozenset(self.excluded),
            self.only,
            self.may_evict,
        )

    def describe(self) -> str:
        """Return how far it has come, in words."""
        said = self.title
        if self.why is not None:
            said = f"{said}: {self.why}"
        elif self.progress is not None:
            said = f"{said}: {_far(self.progress)}"
        return f"{said}; {self.waiting} requests wait" if self.waiting > 1 else said

    @property
    def title(self) -> str:
        """What goes on, and where."""
        where = f" on {self.node.name}" if self.node else ""
        return f"loading {self.target.id}{where}"

    def later(self) -> ModelLoading:
        """Return what a client is told that waits no longer."""
        eta = self.progress.eta_seconds if self.progress else None
        seconds = RETRY_SECONDS if eta is None else min(max(1, round(eta)), LONGEST_RETRY_SECONDS)
        extras: dict[str, Any] = {"progress": self.describe()}
        if eta is not None:
            extras["eta_seconds"] = eta
        return ModelLoading(self.describe(), retry_after_seconds=seconds, extras=extras)


Heartbeat = Callable[[Demand], Awaitable[None]]


async def in_silence(demand: Demand) -> None:
    """A heartbeat for those whose client hears nothing before the answer."""
    del demand


class Failures:
    """Loads that have failed a moment ago: requests get the reason instead of another try."""

    def __init__(self) -> None:
        self._by_model: dict[str, tuple[float, ApiError]] = {}

    def note(self, node_id: str, error: ApiError, now: float) -> None:
        """Remember that the load of *node_id* has ended with *error*."""
        self._by_model[node_id] = now + BACK_OFF_SECONDS, error

    def refuse(self, node_id: str, now: float) -> None:
        """Raise what the load of *node_id* has ended with, unless that is long ago."""
        until, error = self._by_model.get(node_id, (now, None))
        if error is not None and now < until:
            raise error
        self._by_model.pop(node_id, None)


def _far(progress: Progress) -> str:
    said: str = progress.phase
    if progress.bytes_total:
        said = f"{said} {100 * progress.bytes_done // progress.bytes_total}%"
    if progress.eta_seconds is not None:
        said = f"{said}, {max(1, round(progress.eta_seconds))} s left"
    return said
