"""Decides again and again, whenever there is news, for as long as somebody waits for a decision."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cortex.gateway.background import Background


class Rounds:
    """Calls *decide*, which returns in how many seconds to call it again at the latest.

    None says that nobody waits any more. It is called by one task, that lives only while somebody
    waits; what happens while it decides is news for the next round.
    """

    def __init__(self, background: Background, decide: Callable[[], float | None]) -> None:
        self._background = background
        self._decide = decide
        self._news = asyncio.Event()
        self._is_running = False

    def hear(self) -> None:
        """Have those who wait looked at again; where nobody does, do nothing."""
        self._news.set()

    def wake(self) -> None:
        """Begin, where nobody has waited so far."""
        self._news.set()
        if not self._is_running:
            self._is_running = True
            self._background.start(self._run(), "rounds")

    async def _run(self) -> None:
        try:
            self._news.clear()
            while (seconds := self._decide()) is not None:
                try:
                    async with asyncio.timeout(max(0.0, seconds)):
                        await self._news.wait()
                except TimeoutError:
                    pass
                self._news.clear()
        finally:
            self._is_running = False
