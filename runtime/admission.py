"""Seats: how many answers a model gives at a time, and how many requests may wait for that.

A request takes a seat for each of its choices, all at once. Who waits is seated by priority, and
first come, first served within one. A queue that is full sends the last in this order home: that is
who comes, unless somebody less urgent waits. Every refusal carries the numbers it was made by.

``Seats`` is the arithmetic, without clock or event loop; ``Admission`` waits for it. A ticket is
given back in every case, whether it was seated, still queued or refused, so a request that is
cancelled at any point leaks nothing.

What a prompt takes of the KV cache is not asked here but in the device, in the same order, where it
is known which part of it is there already: the prompt and a little, never ``max_tokens``
(``device/scheduler.py``). A prompt that can never fit is refused before (``sampling.py``).
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

from cortex.ipc.errors import ApiError, InvalidRequest, Overloaded, ShuttingDown

DRAIN_RETRY_SECONDS = 15
"""About what a restart takes."""


class CacheRoom(NamedTuple):
    """Tokens of a model's KV cache: those that no sequence holds, of all."""

    free_tokens: int
    total_tokens: int


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place; ``call`` comes at most once, with None for its seats or with why not."""

    call: Callable[[ApiError | None], None]
    seats: int = 1
    priority: int = 0
    is_seated: bool = False


class Seats:
    """Seats and the queue before them; *room* is only told to those who are refused."""

    def __init__(
        self,
        max_in_flight: int,
        max_queue_depth: int,
        room: Callable[[], CacheRoom | None] = lambda: None,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.max_queue_depth = max_queue_depth
        self.in_flight = 0
        self._room = room
        self._queue: list[Ticket] = []

    @property
    def queue_depth(self) -> int:
        """Requests that wait for their seats."""
        return len(self._queue)

    @property
    def are_full(self) -> bool:
        """Whether one more request, no more urgent than those here, would be refused."""
        has_no_seat = bool(self._queue) or self.in_flight >= self.max_in_flight
        return has_no_seat and self.queue_depth >= self.max_queue_depth

    def arrive(self, ticket: Ticket) -> None:
        """Seat or queue *ticket*; raise Overloaded where the queue is full of the no less urgent.

        Where somebody less urgent waits in a full queue, the last of them is sent home instead.
        """
        bisect.insort(self._queue, ticket, key=lambda waiting: -waiting.priority)
        self._seat_the_next()
        if self.queue_depth > self.max_queue_depth:
            last = self._queue.pop()
            if last is ticket:
                raise self.overloaded("the model is full")
            last.call(self.overloaded("the model is full, and a more urgent request came"))

    def leave(self, ticket: Ticket) -> None:
        """Give back whatever *ticket* has; free seats go to who is next."""
        if ticket.is_seated:
            ticket.is_seated = False
            self.in_flight -= ticket.seats
        else:
            with contextlib.suppress(ValueError):  # it was refused, so it does not queue
                self._queue.remove(ticket)
        self._seat_the_next()

    def overloaded(self, why: str) -> Overloaded:
        """Return the refusal; the more wait already, the later one should come back."""
        return Overloaded(
            f"{why}: {self.in_words}; try again",
            retry_after_seconds=min(1 + self.queue_depth, 30),
            extras=self._numbers(),
        )

    @property
    def in_words(self) -> str:
        """What is taken, of how much."""
        words = (
            f"{self.in_flight} of {self.max_in_flight} seats are taken, "
            f"{self.queue_depth} of {self.max_queue_depth} places in the queue"
        )
        room = self._room()
        if room is None:
            return words
        return f"{words}; {room.free_tokens} of {room.total_tokens} tokens of KV cache are free"

    def _numbers(self) -> dict[str, int]:
        numbers = {
            "seats_taken": self.in_flight,
            "seats": self.max_in_flight,
            "queue_depth": self.queue_depth,
            "max_queue_depth": self.max_queue_depth,
        }
        room = self._room()
        if room is not None:
            numbers |= {"kv_free_tokens": room.free_tokens, "kv_total_tokens": room.total_tokens}
        return numbers

    def _seat_the_next(self) -> None:
        while self._queue and self.in_flight + self._queue[0].seats <= self.max_in_flight:
            ticket = self._queue.pop(0)
            self.in_flight += ticket.seats
            ticket.is_seated = True
            ticket.call(None)


class Admission:
    """The seats of one model, waited for."""

    def __init__(self, seats: Seats, max_wait_seconds: float) -> None:
        self.seats = seats
        self._max_wait_seconds = max_wait_seconds
        self._waiting: set[asyncio.Future[ApiError | None]] = set()
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def seat(self, count: int = 1, priority: int = 0) -> AsyncIterator[None]:
        """Hold *count* seats; raise Overloaded or ShuttingDown where they are not to be had.

        Of those who wait a higher *priority* goes first. Raise InvalidRequest where there will
        never be so many seats.
        """
        if self._is_closed:
            raise shutting_down()
        self._refuse_too_many(count)
        called: asyncio.Future[ApiError | None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(lambda refusal: _call(called, refusal), count, priority)
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
            _call(called, shutting_down())

    def _refuse_too_many(self, count: int) -> None:
        most = self.seats.max_in_flight
        if count > most:
            raise InvalidRequest(
                f"{count} answers are asked for, and the model gives at most {most} at a time",
                param="n",
                extras={"n": count, "seats": most},
            )

    async def _wait(self, called: asyncio.Future[ApiError | None]) -> None:
        self._waiting.add(called)
        try:
            async with asyncio.timeout(self._max_wait_seconds):
                await asyncio.wait([called])
        except TimeoutError:
            raise self.seats.overloaded(
                f"no seat became free within {self._max_wait_seconds:g} seconds"
            ) from None
        finally:
            self._waiting.discard(called)
        if (refusal := called.result()) is not None:
            raise refusal


def _call(called: asyncio.Future[ApiError | None], refusal: ApiError | None) -> None:
    if not called.done():
        called.set_result(refusal)


def shutting_down() -> ShuttingDown:
    """Return the answer for whoever comes while the neuron drains."""
    return ShuttingDown("the neuron is shutting down", retry_after_seconds=DRAIN_RETRY_SECONDS)
