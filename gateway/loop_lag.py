"""How late the event loop is: everything in the gateway waits for it, so its delay is everybody's.

A task sleeps for a moment, over and over; by how much it wakes too late is the lag. Code that
blocks shows here before it shows anywhere else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

LOOK_SECONDS = 0.5


async def watch_loop_lag(
    observe: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Tell *observe* the lag in seconds, for ever."""
    while True:
        due = clock() + LOOK_SECONDS
        await sleep(LOOK_SECONDS)
        observe(max(clock() - due, 0.0))
