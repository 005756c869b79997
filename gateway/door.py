"""Lets inference in until the daemon drains, and knows when the last request has left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from cortex.ipc.errors import ShuttingDown


class Door:
    """Open until it is closed, once."""

    def __init__(self) -> None:
        self.is_closed = False
        self.inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a request while the block runs; raise ShuttingDown behind a closed door."""
        if self.is_closed:
            raise ShuttingDown("the gateway is shutting down", retry_after_seconds=5)
        self.inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._empty.set()

    async def close(self, within_seconds: float) -> bool:
        """Let nobody in any more; return whether everybody left in time."""
        self.is_closed = True
        try:
            async with asyncio.timeout(within_seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
