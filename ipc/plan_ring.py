"""Step plans from the first rank of a tensor-parallel group to all others: one writer, N readers.

    memory (a sealed memfd):     [ slot 0 | slot 1 | ... | slot SLOTS - 1 ]
    filled 0 .. N-1 (eventfds):  the writer adds the number of slots it wrote, to each
    freed  0 .. N-1 (eventfds):  each reader adds the number of slots it is done with

    slot, SLOT_BYTES           offset  size
    length                          0     4    of what this slot holds of the message
    more                            4     4    1 where the message goes on in the next slot, else 0
    bytes                           8     -

The writer alone writes to the memory, every reader reads all of it. As in ``ring.py`` the counters
*are* the eventfds: ``write`` adds and ``read`` takes under one kernel spinlock, a release and an
acquire. A reader that takes n from its ``filled`` sees those n slots whole; the writer writes to a
slot again only when it has taken from *every* ``freed`` that the slot is done with. So on aarch64
as on x86-64 nothing is read that is half written, with no barrier that Python does not have, and
the same write is the wake-up: no reader can miss one.

A message longer than a slot goes on in the next ones, however many: each is published when it is
written, and a reader frees it when it has copied it, so a message may be longer than the ring. No
two messages share a slot.

A full ring makes the writer wait for its slowest reader: back-pressure, never loss. A reader that
is gone never frees anything, which is what the writer's timeout is for.

One writer and one reader per pair of eventfds, one thread each.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import time
from collections.abc import Sequence

from cortex.ipc.descriptors import Descriptor, mapped, sealed_memory, wake_up

SLOTS = 64
SLOT_BYTES = 32 * 1024
"""A decode step of 32 sequences takes 0.8 kB, a grammar's mask of 150,000 tokens 19 kB."""
HEAD = struct.Struct("<II")


class PlanRing:
    """The memory and the counters of all readers; made by the supervisor, sent to the ranks."""

    def __init__(self, readers: int, slots: int = SLOTS) -> None:
        self.memory = sealed_memory("plan-ring", slots * SLOT_BYTES)
        self.filled = [wake_up() for _ in range(readers)]
        self.freed = [wake_up() for _ in range(readers)]

    def descriptors(self, rank: int) -> list[Descriptor]:
        """Return what *rank* needs: the first to make a PlanWriter, the others a PlanReader."""
        if rank == 0:
            return [self.memory, *self.filled, *self.freed]
        return [self.memory, self.filled[rank - 1], self.freed[rank - 1]]

    def close(self) -> None:
        """Give up this process's descriptors; the ranks keep their own."""
        for descriptor in self.descriptors(0):
            descriptor.close()


class PlanRingFull(TimeoutError):
    """A reader has freed nothing for as long as the writer was told to wait."""


class PlanWriter:
    """The first rank's end."""

    def __init__(self, descriptors: Sequence[Descriptor]) -> None:
        """*descriptors* are those of rank 0, which are this object's from now on."""
        memory, *counters = self._descriptors = list(descriptors)
        self._map = mapped(memory, writable=True)
        self._slots = len(self._map) // SLOT_BYTES
        readers = len(counters) // 2
        self._filled, self._freed = counters[:readers], counters[readers:]
        self._room = [self._slots] * readers
        self._slot = 0

    def broadcast(self, message: bytes, timeout_seconds: float | None = None) -> None:
        """Write *message* for all readers; raise PlanRingFull where one of them does not read.

        What was written of it by then stays in the ring, which is of no use any more.
        """
        view, size = memoryview(message), SLOT_BYTES - HEAD.size
        for start in range(0, len(message) or 1, size):
            self._wait_for_room(timeout_seconds)
            self._write(view[start : start + size], has_more=start + size < len(message))

    def close(self) -> None:
        """Unmap the memory, and give up the descriptors."""
        self._map.close()
        for descriptor in self._descriptors:
            descriptor.close()

    def _write(self, part: memoryview, *, has_more: bool) -> None:
        at = self._slot * SLOT_BYTES
        HEAD.pack_into(self._map, at, len(part), has_more)
        self._map[at + HEAD.size : at + HEAD.size + len(part)] = part
        self._slot = (self._slot + 1) % self._slots
        for reader, filled in enumerate(self._filled):
            self._room[reader] -= 1
            os.eventfd_write(filled.fd, 1)

    def _wait_for_room(self, timeout_seconds: float | None) -> None:
        for reader, freed in enumerate(self._freed):
            if self._room[reader]:
                continue
            taken = _take(freed, timeout_seconds)
            if not taken:
                raise PlanRingFull(f"rank {reader + 1} takes no plans from the ring")
            self._room[reader] = taken


class PlanReader:
    """The end of any other rank; ``fileno`` becomes readable when something new waits."""

    def __init__(self, descriptors: Sequence[Descriptor]) -> None:
        """*descriptors* are those of the rank, which are this object's from now on."""
        self._descriptors = list(descriptors)
        memory, self._filled, self._freed = descriptors
        self._map = mapped(memory, writable=False)
        self._slots = len(self._map) // SLOT_BYTES
        self._ready = self._slot = 0
        self._parts: list[bytes] = []

    def fileno(self) -> int:
        """Return what poll wants; only where ``take`` has returned None is it worth a wait."""
        return self._filled.fd

    def take(self, timeout_seconds: float | None = 0.0) -> bytes | None:
        """Return the next message, or None where none is complete in time.

        What there is of one that is not complete is kept, and freed, for the next call.
        """
        while self._has_slot(timeout_seconds):
            if not self._read():
                message, self._parts = b"".join(self._parts), []
                return message
        return None

    def close(self) -> None:
        """Unmap the memory, and give up the descriptors."""
        self._map.close()
        for descriptor in self._descriptors:
            descriptor.close()

    def _has_slot(self, timeout_seconds: float | None) -> bool:
        if not self._ready:
            self._ready = _take(self._filled, timeout_seconds)
        return self._ready > 0

    def _read(self) -> bool:
        """Take one slot; return whether the message goes on."""
        at = self._slot * SLOT_BYTES
        length, more = HEAD.unpack_from(self._map, at)
        self._parts.append(self._map[at + HEAD.size : at + HEAD.size + length])
        self._slot = (self._slot + 1) % self._slots
        self._ready -= 1
        os.eventfd_write(self._freed.fd, 1)
        return bool(more)


def _take(counter: Descriptor, timeout_seconds: float | None) -> int:
    """Return what *counter* counts and empty it; 0 where it stays empty for so long."""
    until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        with contextlib.suppress(BlockingIOError):  # it is empty
            return os.eventfd_read(counter.fd)
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            return 0
        waiting = select.poll()
        waiting.register(counter.fd, select.POLLIN)
        waiting.poll(None if left is None else left * 1e3)
