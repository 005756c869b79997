"""A time limit for each of very many short waits of one task, with hardly a timer.

``asyncio.timeout`` starts a timer for each wait and cancels it after. Limits that move on with time
need no more than one timer: it rings at the limit of some earlier wait, looks what the limit is
now, and rings again then. Entering and leaving only write down a number.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self


class Deadline:
    """``with deadline.at(when): await ...`` raises TimeoutError where that takes longer.

    *when* is of the loop's clock. It belongs to the task that makes it, and does not nest.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a task makes it"
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._when = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf
        self._has_struck = False
        self._cancelling = 0

    def at(self, when: float) -> Self:
        """Set the limit of the block that follows."""
        self._when = when
        self._cancelling = self._task.cancelling()
        if when < self._rings_at:
            self._ring_at(when)
        return self

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._when = math.inf
        if self._has_struck:
            self._has_struck = False
            if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _ring_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = when
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings_at = None, math.inf
        if self._loop.time() < self._when < math.inf:
            self._ring_at(self._when)
        elif self._when < math.inf:
            self._has_struck = True
            self._when = math.inf
            self._task.cancel()
