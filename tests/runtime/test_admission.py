"""Seats and the queue before them: first come, first served, and nothing leaks."""

import asyncio
from typing import Never

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.ipc.errors import Overloaded, ShuttingDown
from cortex.runtime.admission import Admission, Seats, Ticket


class FakeRequest:
    """A request that notes when it was seated."""

    def __init__(self) -> None:
        self.was_seated = False
        self.ticket = Ticket(self._seated)

    def _seated(self) -> None:
        self.was_seated = True


def arrive(seats: Seats) -> FakeRequest:
    """Let a new request arrive."""
    request = FakeRequest()
    seats.arrive(request.ticket)
    return request


def test_a_free_seat_is_given_at_once() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=0)

    assert arrive(seats).was_seated
    assert (seats.in_flight, seats.queue_depth) == (1, 0)


def test_who_waits_longest_gets_the_seat() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=2)
    seated, first, second = arrive(seats), arrive(seats), arrive(seats)

    seats.leave(seated.ticket)

    assert (first.was_seated, second.was_seated) == (True, False)


def test_a_full_queue_says_when_to_come_back() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=1)
    arrive(seats)
    arrive(seats)

    with pytest.raises(Overloaded) as refused:
        arrive(seats)

    assert refused.value.retry_after_seconds == 2


def test_a_waiter_that_leaves_is_forgotten() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=1)
    seated, waiter = arrive(seats), arrive(seats)

    seats.leave(waiter.ticket)
    seats.leave(seated.ticket)

    assert (seats.in_flight, seats.queue_depth, waiter.was_seated) == (0, 0, False)


def test_a_refused_request_may_leave() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=0)
    arrive(seats)
    refused = FakeRequest()

    with pytest.raises(Overloaded):
        seats.arrive(refused.ticket)
    seats.leave(refused.ticket)

    assert seats.in_flight == 1


@given(
    seats=st.integers(1, 3),
    queue=st.integers(0, 3),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60),
)
def test_no_seat_is_ever_lost_or_given_twice(
    seats: int, queue: int, moves: list[tuple[bool, int]]
) -> None:
    table = Seats(seats, queue)
    inside: list[FakeRequest] = []
    for arrives, which in moves:
        if arrives:
            try:
                inside.append(arrive(table))
            except Overloaded:
                assert len(inside) == seats + queue
        elif inside:
            table.leave(inside.pop(which % len(inside)).ticket)

        assert table.in_flight == min(len(inside), seats)
        assert table.queue_depth == len(inside) - table.in_flight
        assert [r.was_seated for r in inside] == sorted(
            (r.was_seated for r in inside), reverse=True
        )


async def sit(admission: Admission, sitting: asyncio.Event) -> Never:
    """Take a seat and stay."""
    async with admission.seat():
        sitting.set()
        await asyncio.Event().wait()
    raise AssertionError


async def test_a_cancelled_waiter_gives_its_place_back() -> None:
    admission = Admission(1, 1, max_wait_seconds=60)

    async with admission.seat(), asyncio.TaskGroup() as tasks:
        waiter = tasks.create_task(sit(admission, asyncio.Event()))
        await asyncio.sleep(0)
        assert admission.seats.queue_depth == 1
        waiter.cancel()

    assert (admission.seats.in_flight, admission.seats.queue_depth) == (0, 0)


async def test_a_seat_goes_to_the_next_when_its_holder_is_cancelled() -> None:
    admission = Admission(1, 1, max_wait_seconds=60)
    first, second = asyncio.Event(), asyncio.Event()

    async with asyncio.TaskGroup() as tasks:
        holder = tasks.create_task(sit(admission, first))
        await first.wait()
        waiter = tasks.create_task(sit(admission, second))
        holder.cancel()
        await second.wait()
        waiter.cancel()

    assert admission.seats.in_flight == 0


async def test_who_is_seated_and_cancelled_in_the_same_moment_leaks_nothing() -> None:
    admission = Admission(1, 1, max_wait_seconds=60)

    async with asyncio.TaskGroup() as tasks:
        async with admission.seat():
            waiter = tasks.create_task(sit(admission, asyncio.Event()))
            await asyncio.sleep(0)
        waiter.cancel()

    assert (admission.seats.in_flight, admission.seats.queue_depth) == (0, 0)


async def test_waiting_has_an_end() -> None:
    admission = Admission(1, 1, max_wait_seconds=0.01)

    async with admission.seat():
        with pytest.raises(Overloaded, match=r"within 0\.01 seconds"):
            async with admission.seat():
                raise AssertionError

    assert admission.seats.in_flight == 0


async def test_closing_sends_waiters_home_and_lets_the_seated_stay() -> None:
    admission = Admission(1, 1, max_wait_seconds=60)

    async with admission.seat():
        waiter = asyncio.ensure_future(sit(admission, asyncio.Event()))
        await asyncio.sleep(0)
        admission.close()
        with pytest.raises(ShuttingDown) as refused:
            await waiter

    assert refused.value.retry_after_seconds == 15


async def test_a_closed_door_stays_closed() -> None:
    admission = Admission(1, 1, max_wait_seconds=60)
    admission.close()

    with pytest.raises(ShuttingDown):
        async with admission.seat():
            raise AssertionError
