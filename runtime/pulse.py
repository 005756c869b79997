"""A wake-up for everybody who waits for a state to change, and looks again then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pulse:
    """Like asyncio.Condition without its lock: one writer, which never waits, and many waiters."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def beat(self) -> None:
        """Wake everybody who waits now."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return as soon as *condition* holds; it is looked at now and after every beat."""
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
