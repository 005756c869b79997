"""Lets inference in until the daemon drains, and knows when the last request has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cortex.ipc.errors import ShuttingDown


class Door:
    """Open until it is closed, once."""

    def __init__(self) -> None:
        self.is_closed = False
        self._stays: set[asyncio.Timeout] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Requests that are inside."""
        return len(self._stays)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Count a request while the block runs.

        Raise ShuttingDown behind a closed door, and inside the block when it is ``cut``.
        """
        if self.is_closed:
            raise ShuttingDown("the gateway is shutting down", retry_after_seconds=5)
        stay = asyncio.timeout(None)
        try:
            async with stay:
                self._stays.add(stay)
                self._empty.clear()
                try:
                    yield
                finally:
                    self._stays.discard(stay)
                    if not self._stays:
                        self._empty.set()
        except TimeoutError as exc:
            if not stay.expired():
                raise
            raise ShuttingDown("the gateway was stopped", retry_after_seconds=5) from exc

    async def close(self, within_seconds: float) -> bool:
        """Let nobody in any more; return whether everybody left in time."""
        self.is_closed = True
        try:
            async with asyncio.timeout(within_seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def cut(self) -> None:
        """Let nobody in any more, and end what is inside with ShuttingDown."""
        self.is_closed = True
        now = asyncio.get_running_loop().time()
        for stay in self._stays:
            stay.reschedule(now)
