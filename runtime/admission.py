"""Seats: how many requests a model answers at a time, and how many may wait for that.

``Seats`` is the arithmetic, without clock or event loop; ``Admission`` waits for it. A ticket is
given back in every case, whether it was seated, still queued or refused, so a request that is
cancelled at any point leaks nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cortex.ipc.errors import Overloaded, ShuttingDown

DRAIN_RETRY_SECONDS = 15
"""About what a restart takes."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place; ``on_seated`` is called when it gets a seat."""

    on_seated: Callable[[], None]
    is_seated: bool = False


class Seats:
    """Seats and the queue before them, first come, first served."""

    def __init__(self, max_in_flight: int, max_queue_depth: int) -> None:
        self.max_in_flight = max_in_flight
        self.max_queue_depth = max_queue_depth
        self.in_flight = 0
        self._queue: deque[Ticket] = deque()

    @property
    def queue_depth(self) -> int:
        """Requests that wait for a seat."""
        return len(self._queue)

    def arrive(self, ticket: Ticket) -> None:
        """Seat or queue *ticket*; raise Overloaded where the queue is full."""
        if self.in_flight < self.max_in_flight:
            self._seat(ticket)
        elif self.queue_depth < self.max_queue_depth:
            self._queue.append(ticket)
        else:
            raise self.overloaded(f"all {self.max_in_flight} seats are taken and the queue is full")

    def leave(self, ticket: Ticket) -> None:
        """Give back whatever *ticket* has; a seat goes to who waits longest."""
        if not ticket.is_seated:
            with contextlib.suppress(ValueError):  # it was refused, so it never queued
                self._queue.remove(ticket)
            return
        ticket.is_seated = False
        self.in_flight -= 1
        if self._queue and self.in_flight < self.max_in_flight:
            self._seat(self._queue.popleft())

    def overloaded(self, why: str) -> Overloaded:
        """Return the refusal; the more wait already, the later one should come back."""
        retry_after_seconds = min(1 + self.queue_depth, 30)
        return Overloaded(f"{why}; try again", retry_after_seconds=retry_after_seconds)

    def _seat(self, ticket: Ticket) -> None:
        self.in_flight += 1
        ticket.is_seated = True
        ticket.on_seated()


class Admission:
    """The seats of one model, waited for."""

    def __init__(self, max_in_flight: int, max_queue_depth: int, max_wait_seconds: float) -> None:
        self.seats = Seats(max_in_flight, max_queue_depth)
        self._max_wait_seconds = max_wait_seconds
        self._waiting: set[asyncio.Future[None]] = set()
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """Hold a seat; raise Overloaded or ShuttingDown where there is none to be had."""
        if self._is_closed:
            raise shutting_down()
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(on_seated=lambda: _call(called))
        try:
            self.seats.arrive(ticket)
            await self._wait(called)
            yield
        finally:
            self.seats.leave(ticket)

    def close(self) -> None:
        """Send everybody home who waits, and everybody who comes; who sits may stay."""
        self._is_closed = True
        for called in self._waiting:
            called.cancel()

    async def _wait(self, called: asyncio.Future[None]) -> None:
        self._waiting.add(called)
        try:
            async with asyncio.timeout(self._max_wait_seconds):
                await asyncio.wait([called])
            if called.cancelled():
                raise shutting_down()
        except TimeoutError:
            raise self.seats.overloaded(
                f"no seat became free within {self._max_wait_seconds:g} seconds"
            ) from None
        finally:
            self._waiting.discard(called)


def _call(called: asyncio.Future[None]) -> None:
    if not called.done():
        called.set_result(None)


def shutting_down() -> ShuttingDown:
    """Return the answer for whoever comes while the neuron drains."""
    return ShuttingDown("the neuron is shutting down", retry_after_seconds=DRAIN_RETRY_SECONDS)
