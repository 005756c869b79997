"""Token records from one device process to its supervisor.

    memory (a sealed memfd):   [ record 0 | record 1 | ... | record capacity-1 ]
    filled (an eventfd):       the producer adds the number of records it published
    freed  (an eventfd):       the consumer adds the number of records it is done with

    record, 24 bytes           offset  size
    sequence_id                     0     8
    token_id                        8     4    meaningless where flags has no TOKEN
    logprob                        12     4    of the unmodified distribution; NaN where not asked
    flags                          16     4    Flag bits
    spare                          20     4    of a TOP record its rank, from 1; else zero

A TOP record is one of the likeliest alternatives to a token; those of a token come right before its
own record, likeliest first, and end nothing. Where the log probabilities of a prompt are asked for,
a SCORE record for each of its tokens but the first comes before everything else of the sequence.

The ring's two counters *are* the two eventfds. ``write`` adds and ``read`` takes under one kernel
spinlock, a release and an acquire: whoever reads n from ``filled`` sees those n records whole, and
whoever reads n from ``freed`` may overwrite those n slots, on x86-64 (TSO) as on aarch64 (weakly
ordered), with no barrier that Python does not have. The same write is the wake-up, so none can be
lost and there is no sleeping flag, which would need a store-load fence. One write per step.

A full ring makes the producer wait on ``freed``: back-pressure, never loss. The finish of a
sequence is a record like any other, so it can never overtake the sequence's tokens.

One producer, one consumer, one thread each.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
from collections.abc import Iterable
from enum import IntFlag
from typing import NamedTuple

from cortex.ipc.descriptors import mapped, sealed_memory, wake_up

RECORD = struct.Struct("<QIfII")


class Flag(IntFlag):
    """What a record carries; a token and a finish may share one record."""

    TOKEN = 1
    STOP = 2
    """The sequence ended: with one of its stop tokens, which the record carries, or, without TOKEN,
    because its grammar lets nothing follow."""
    LENGTH = 4
    """The sequence ended at max_tokens or at the end of the context."""
    CANCELLED = 8
    """The sequence ended because somebody asked for it."""
    TOP = 16
    """No token of the answer: one of the likeliest for the token that follows, and its logprob."""
    PROMPT = 32
    """No token: ``token_id`` is how many tokens of the prompt were found in the prefix cache. It
    comes once, before the first token of an answer."""
    SCORE = 64
    """No token of the answer: the next one of the prompt, and its logprob."""
    FINISH = STOP | LENGTH | CANCELLED


class TokenRecord(NamedTuple):
    """One slot of the ring; see the module's table."""

    sequence_id: int
    token_id: int
    logprob: float
    flags: int
    spare: int = 0


class RingFull(TimeoutError):
    """The ring stayed full; the first ``published`` records of the call are in it all the same."""

    def __init__(self, published: int) -> None:
        super().__init__("the consumer of the token ring does not read")
        self.published = published


class TokenRing:
    """The shared memory and its two counters; made by the supervisor, sent to the child."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.memory = sealed_memory("token-ring", capacity * RECORD.size)
        self.filled = wake_up()
        self.freed = wake_up()

    def close(self) -> None:
        """Give up this process's descriptors; the other end keeps its own."""
        for descriptor in (self.memory, self.filled, self.freed):
            descriptor.close()


class TokenProducer:
    """The writing end, in the device process."""

    def __init__(self, ring: TokenRing) -> None:
        self._ring = ring
        self._map = mapped(ring.memory, writable=True)
        self._room = ring.capacity
        self._slot = 0
        self._freed = select.poll()
        self._freed.register(ring.freed.fd, select.POLLIN)

    def publish(self, records: list[TokenRecord], timeout_seconds: float | None = None) -> None:
        """Write a step's records and wake the consumer; more than the capacity go in parts.

        Raise RingFull, which says how many got in, where it stays full for *timeout_seconds*.
        """
        at = 0
        while at < len(records):
            if not self._has_room(timeout_seconds):
                raise RingFull(at)
            part = min(self._room, len(records) - at)
            self._write(records[at : at + part])
            self._room -= part
            at += part
            os.eventfd_write(self._ring.filled.fd, part)

    def close(self) -> None:
        """Unmap the memory."""
        self._map.close()

    def _write(self, records: Iterable[TokenRecord]) -> None:
        slot, capacity = self._slot, self._ring.capacity
        for record in records:
            RECORD.pack_into(self._map, slot * RECORD.size, *record)
            slot = (slot + 1) % capacity
        self._slot = slot

    def _has_room(self, timeout_seconds: float | None) -> bool:
        while True:
            with contextlib.suppress(BlockingIOError):  # nothing was freed since the last look
                self._room += os.eventfd_read(self._ring.freed.fd)
            if self._room:
                return True
            if not self._freed.poll(None if timeout_seconds is None else timeout_seconds * 1e3):
                return False


class TokenConsumer:
    """The reading end, in the supervisor; ``fileno`` becomes readable when records wait."""

    def __init__(self, ring: TokenRing) -> None:
        self._ring = ring
        self._map = mapped(ring.memory, writable=False)
        self._view = memoryview(self._map)
        self._slot = 0

    def fileno(self) -> int:
        """Return what ``loop.add_reader`` wants."""
        return self._ring.filled.fd

    def take(self) -> list[TokenRecord]:
        """Return all records published so far and free their slots; an empty list where none is."""
        try:
            count = os.eventfd_read(self._ring.filled.fd)
        except BlockingIOError:
            return []
        first = min(count, self._ring.capacity - self._slot)
        records = self._read(self._slot, first)
        if count > first:
            records += self._read(0, count - first)
        self._slot = (self._slot + count) % self._ring.capacity
        os.eventfd_write(self._ring.freed.fd, count)
        return records

    def close(self) -> None:
        """Unmap the memory."""
        self._view.release()
        self._map.close()

    def _read(self, slot: int, count: int) -> list[TokenRecord]:
        at = slot * RECORD.size
        part = self._view[at : at + count * RECORD.size]
        return [TokenRecord._make(fields) for fields in RECORD.iter_unpack(part)]
