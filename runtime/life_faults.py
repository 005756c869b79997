"""What tests let go wrong in one life of a device process, on the supervisor's side of it.

``device_life.py`` puts these around what it does when the life begins, and only where there are
any; ``cortex.ipc.injection`` has their spelling.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cortex.ipc.channel import SupervisorEnd
from cortex.ipc.injection import GARBAGE, Fault, Passes, spelled
from cortex.ipc.messages import Command

BUSY_SECONDS = 1.0
FULL_SECONDS = 2.0
SMALL_RING_RECORDS = 8

Look = Callable[[], None]


class LifeFaults:
    """The *faults* of one life."""

    def __init__(self, faults: list[Fault]) -> None:
        self.spelled = spelled(faults)
        """For the device process."""
        self._busy = Passes(faults, "loop")
        self._full = Passes(faults, "ring")
        self._commands = Passes(faults, "command")
        self.has_small_ring = bool(self._full)
        """Whether the ring should be one that is full soon."""
        self._is_over = False

    def looking(self, fileno: int, look: Look) -> Look:
        """Return *look*, which empties the ring behind *fileno*, with its faults."""
        if not (self._busy or self._full):
            return look

        def struck() -> None:
            if self._full.strikes():
                self._look_away(fileno, struck)
                return
            if self._busy.strikes():
                time.sleep(BUSY_SECONDS)
            look()

        return struck

    def sending(self, channel: SupervisorEnd) -> Callable[[Command], Awaitable[None]]:
        """Return the channel's ``send``, with its faults."""
        if not self._commands:
            return channel.send

        async def struck(command: Command) -> None:
            if self._commands.strikes():
                await channel.send_frame(GARBAGE)
            await channel.send(command)

        return struck

    def end(self) -> None:
        """The life is over, and its descriptors are closed."""
        self._is_over = True

    def _look_away(self, fileno: int, look: Look) -> None:
        loop = asyncio.get_running_loop()

        def look_again() -> None:
            if not self._is_over:
                loop.add_reader(fileno, look)

        loop.remove_reader(fileno)
        loop.call_later(FULL_SECONDS, look_again)
