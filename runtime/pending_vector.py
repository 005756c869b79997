"""One embedding, seen from the supervisor: wait for its vector, cancel it, one end.

    running --Embedded--> finished   the waiter gets the vector
    running --a failure-> failed     the waiter gets the error

The failures are those of a generation (``generation.py``), and what is said of one there holds
here: nothing else happens, and either happens once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cortex.ipc.errors import ApiError


class PendingVector:
    """Waited for once; who stops waiting cancels it."""

    def __init__(self, sequence_id: int, model_id: str, cancel: Callable[[int], None]) -> None:
        self.sequence_id = sequence_id
        self.model_id = model_id
        self.ended = asyncio.Event()
        """Set once the device is done with it, or it failed."""
        self._cancel = cancel
        self._cancelled = False
        self._outcome: bytes | ApiError | None = None

    async def wait(self) -> bytes:
        """Return the vector, as Embedded has it; raise what it failed with."""
        try:
            await self.ended.wait()
        finally:
            self.cancel()
        if isinstance(self._outcome, ApiError):
            raise self._outcome
        assert self._outcome is not None, "it has ended"
        return self._outcome

    def cancel(self) -> None:
        """Ask the device to end it; its Failed comes within a step."""
        if not self._cancelled and not self.ended.is_set():
            self._cancelled = True
            self._cancel(self.sequence_id)

    def give(self, vector: bytes) -> None:
        """End with *vector*; the conversation calls this."""
        self._end(vector)

    def fail(self, error: ApiError) -> None:
        """End with *error*; too late where it has ended already."""
        self._end(error)

    def _end(self, outcome: bytes | ApiError) -> None:
        if not self.ended.is_set():
            self._outcome = outcome
            self.ended.set()
