"""How a device process is, in shared memory: its supervisor looks, whatever the process does.

    memory (a sealed memfd)    written by            value
    word 0                     the main thread       nanoseconds << 2 | state
    word 1                     the loader thread     likewise

    state       the thread                                       a long one is
    IDLE        waits for something to do                        well, while nothing is owed
    STEPPING    obeys commands or makes a step                   a hang
    LOADING     reads a model; a beat per tensor                 a load that stalls
    BLOCKED     waits for room in the token ring                 the supervisor's own fault

Two words, because a load takes minutes beside steps of milliseconds: neither hides the other.

A word is the whole message, 8 bytes and aligned, and has one writer, so one machine store writes it
and a reader sees the old word or the new one, on x86-64 as on aarch64. (``memoryview.cast`` stores
so; ``struct.pack_into`` does not, it clears the bytes first.) No other data hangs on it, so no
barrier is needed; when the store becomes visible, microseconds later, is nothing to deadlines of
seconds. The nanoseconds are those of CLOCK_MONOTONIC, which all processes of a host share, and make
every beat a different word.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from cortex.ipc.descriptors import mapped, sealed_memory

WORD_BYTES = 8
_STATE_BITS = 2


class Activity(IntEnum):
    """What a thread does."""

    IDLE = 0
    STEPPING = 1
    LOADING = 2
    BLOCKED = 3


class BeatingThread(IntEnum):
    """The threads of a device process that beat; the value is the place of the word."""

    MAIN = 0
    LOADER = 1


class Beat(NamedTuple):
    """The last thing a thread said of itself; before the first one, IDLE since ever."""

    activity: Activity
    at_seconds: float
    """By ``time.monotonic``."""


class HeartbeatPage:
    """The shared memory; made by the supervisor, sent to the child."""

    def __init__(self) -> None:
        self.memory = sealed_memory("heartbeat", WORD_BYTES * len(BeatingThread))

    def close(self) -> None:
        """Give up this process's descriptor; the other end keeps its own."""
        self.memory.close()


class HeartbeatWriter:
    """The device process's end: ``beat`` of a thread belongs to that thread."""

    def __init__(
        self, page: HeartbeatPage, clock_nanoseconds: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._words = memoryview(mapped(page.memory, writable=True)).cast("Q")
        self._clock_nanoseconds = clock_nanoseconds

    def main(self, activity: Activity) -> None:
        """Say what the main thread does from now on."""
        self._words[BeatingThread.MAIN] = self._clock_nanoseconds() << _STATE_BITS | activity

    def loader(self, activity: Activity) -> None:
        """Say what the loader thread does from now on."""
        self._words[BeatingThread.LOADER] = self._clock_nanoseconds() << _STATE_BITS | activity


class HeartbeatReader:
    """The supervisor's end."""

    def __init__(self, page: HeartbeatPage) -> None:
        self._map = mapped(page.memory, writable=False)
        self._words = memoryview(self._map).cast("Q")

    def last(self, thread: BeatingThread) -> Beat:
        """Return the last beat of *thread*."""
        word = self._words[thread]
        return Beat(Activity(word & (1 << _STATE_BITS) - 1), (word >> _STATE_BITS) / 1e9)

    def close(self) -> None:
        """Unmap the memory."""
        self._words.release()
        self._map.close()
