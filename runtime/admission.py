"""Seats: how many answers a model gives at a time, and how many requests may wait for that.

A request takes a seat for each of its choices, all at once. ``Seats`` is the arithmetic, without
clock or event loop; ``Admission`` waits for it. A ticket is given back in every case, whether it
was seated, still queued or refused, so a request that is cancelled at any point leaks nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cortex.ipc.errors import InvalidRequest, Overloaded, ShuttingDown

DRAIN_RETRY_SECONDS = 15
"""About what a restart takes."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place; ``on_seated`` is called when it gets its seats."""

    on_seated: Callable[[], None]
    seats: int = 1
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
        """Requests that wait for their seats."""
        return len(self._queue)

    def arrive(self, ticket: Ticket) -> None:
        """Seat or queue *ticket*; raise Overloaded where the queue is full."""
        if not self._queue and self._has_room(ticket):
            self._seat(ticket)
        elif self.queue_depth < self.max_queue_depth:
            self._queue.append(ticket)
        else:
            raise self.overloaded(f"all {self.max_in_flight} seats are taken and the queue is full")

    def leave(self, ticket: Ticket) -> None:
        """Give back whatever *ticket* has; free seats go to who waits longest."""
        if ticket.is_seated:
            ticket.is_seated = False
            self.in_flight -= ticket.seats
        else:
            with contextlib.suppress(ValueError):  # it was refused, so it never queued
                self._queue.remove(ticket)
        while self._queue and self._has_room(self._queue[0]):
            self._seat(self._queue.popleft())

    def overloaded(self, why: str) -> Overloaded:
        """Return the refusal; the more wait already, the later one should come back."""
        retry_after_seconds = min(1 + self.queue_depth, 30)
        return Overloaded(f"{why}; try again", retry_after_seconds=retry_after_seconds)

    def _has_room(self, ticket: Ticket) -> bool:
        return self.in_flight + ticket.seats <= self.max_in_flight

    def _seat(self, ticket: Ticket) -> None:
        self.in_flight += ticket.seats
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
    async def seat(self, count: int = 1) -> AsyncIterator[None]:
        """Hold *count* seats; raise Overloaded or ShuttingDown where they are not to be had.

        Raise InvalidRequest where there will never be so many.
        """
        if self._is_closed:
            raise shutting_down()
        if count > self.seats.max_in_flight:
            raise InvalidRequest(
                f"'n' is {count}, and the model gives at most {self.seats.max_in_flight} answers "
                "at a time",
                param="n",
            )
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(lambda: _call(called), count)
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
