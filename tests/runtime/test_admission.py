"""Seats and the queue before them: first come, first served, and nothing leaks."""

import asyncio
from typing import Never

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.ipc.errors import ApiError, InvalidRequest, Overloaded, ShuttingDown
from cortex.runtime.admission import Admission, CacheRoom, Seats, Ticket


class FakeRequest:
    """A request that notes when it was seated, or sent home."""

    def __init__(self, seats: int = 1, priority: int = 0) -> None:
        self.was_seated = False
        self.refusal: ApiError | None = None
        self.ticket = Ticket(self._called, seats, priority)

    def _called(self, refusal: ApiError | None) -> None:
        assert not self.was_seated
        assert self.refusal is None
        self.was_seated, self.refusal = refusal is None, refusal


def arrive(seats: Seats, count: int = 1, priority: int = 0) -> FakeRequest:
    """Let a new request arrive that needs *count* seats."""
    request = FakeRequest(count, priority)
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


def test_a_refusal_has_the_numbers_it_was_made_by() -> None:
    seats = Seats(max_in_flight=2, max_queue_depth=1, room=lambda: CacheRoom(96, 4096))
    for count in (2, 1):
        arrive(seats, count)

    with pytest.raises(Overloaded) as refused:
        arrive(seats)

    assert refused.value.extras == {
        "seats_taken": 2,
        "seats": 2,
        "queue_depth": 1,
        "max_queue_depth": 1,
        "kv_free_tokens": 96,
        "kv_total_tokens": 4096,
    }
    assert str(refused.value) == (
        "the model is full: 2 of 2 seats are taken, 1 of 1 places in the queue; "
        "96 of 4096 tokens of KV cache are free; try again"
    )


@pytest.mark.parametrize(
    ("max_queue_depth", "arrivals", "full"),
    [(0, [1], False), (0, [2], True), (1, [2], False), (1, [2, 1], True), (1, [1, 2], True)],
)
def test_it_is_full_where_one_more_would_be_refused(
    max_queue_depth: int, arrivals: list[int], *, full: bool
) -> None:
    seats = Seats(2, max_queue_depth)
    for count in arrivals:
        arrive(seats, count)

    assert seats.are_full == full


def test_the_more_urgent_waits_in_front_and_equals_in_order_of_arrival() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=9)
    seated = arrive(seats)
    waiting = [arrive(seats, priority=priority) for priority in (0, 5, -1, 5, 0)]

    order = []
    for _ in waiting:
        seats.leave(seated.ticket)
        [seated] = [w for w in waiting if w.was_seated and w not in order]
        order.append(seated)

    assert [waiting.index(request) for request in order] == [1, 3, 0, 4, 2]


def test_the_more_urgent_takes_seats_that_are_too_few_for_who_waits() -> None:
    seats = Seats(max_in_flight=2, max_queue_depth=2)
    arrive(seats)
    wide = arrive(seats, 2)

    assert arrive(seats, priority=1).was_seated
    assert not wide.was_seated


def test_a_full_queue_sends_the_last_of_the_less_urgent_home() -> None:
    seats = Seats(max_in_flight=1, max_queue_depth=2)
    _, first, last = arrive(seats), arrive(seats), arrive(seats)

    urgent = arrive(seats, priority=1)

    assert (first.refusal, urgent.refusal) == (None, None)
    assert isinstance(last.refusal, Overloaded)
    assert "more urgent" in str(last.refusal)
    assert seats.queue_depth == 2
    seats.leave(last.ticket)
    assert seats.queue_depth == 2


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


def test_who_needs_several_seats_waits_for_all_of_them_and_is_not_overtaken() -> None:
    seats = Seats(max_in_flight=3, max_queue_depth=2)
    first, second = arrive(seats), arrive(seats)
    wide, narrow = arrive(seats, 3), arrive(seats)

    seats.leave(first.ticket)
    assert (wide.was_seated, narrow.was_seated, seats.in_flight) == (False, False, 1)
    seats.leave(second.ticket)
    assert (wide.was_seated, narrow.was_seated, seats.in_flight) == (True, False, 3)


def test_several_may_follow_one_that_had_several_seats() -> None:
    seats = Seats(max_in_flight=3, max_queue_depth=3)
    wide = arrive(seats, 3)
    followers = [arrive(seats) for _ in range(3)]

    seats.leave(wide.ticket)

    assert [request.was_seated for request in followers] == [True] * 3


def test_those_behind_a_waiter_that_leaves_move_up() -> None:
    seats = Seats(max_in_flight=2, max_queue_depth=2)
    arrive(seats)
    wide, narrow = arrive(seats, 2), arrive(seats)

    seats.leave(wide.ticket)

    assert narrow.was_seated


@given(
    seats=st.integers(1, 4),
    queue=st.integers(0, 3),
    moves=st.lists(
        st.tuples(st.integers(0, 4), st.integers(-1, 1), st.integers(0, 20)), max_size=60
    ),
)
def test_no_seat_is_ever_lost_or_given_twice(
    seats: int, queue: int, moves: list[tuple[int, int, int]]
) -> None:
    table = Seats(seats, queue)
    inside: list[FakeRequest] = []
    for needs, priority, which in moves:
        before = [request for request in inside if request.was_seated]
        if needs:
            try:
                inside.append(arrive(table, min(needs, seats), priority))
            except Overloaded:
                assert table.queue_depth == queue
        elif inside:
            table.leave(inside.pop(which % len(inside)).ticket)
        for request in [request for request in inside if request.refusal]:
            inside.remove(request)
            table.leave(request.ticket)

        seated = [request for request in inside if request.was_seated]
        waiting = [request for request in inside if not request.was_seated]
        waiting.sort(key=lambda request: -request.ticket.priority)
        assert table.in_flight == sum(request.ticket.seats for request in seated) <= seats
        assert table.queue_depth == len(waiting) <= queue
        assert not waiting or table.in_flight + waiting[0].ticket.seats > seats
        for newly in set(seated) - set(before):  # nobody overtook one who was no less urgent
            at = inside.index(newly)
            assert not any(
                other.ticket.priority >= newly.ticket.priority
                for other in inside[:at]
                if not other.was_seated
            )


async def sit(admission: Admission, sitting: asyncio.Event, priority: int = 0) -> Never:
    """Take a seat and stay."""
    async with admission.seat(priority=priority):
        sitting.set()
        await asyncio.Event().wait()
    raise AssertionError


async def test_a_cancelled_waiter_gives_its_place_back() -> None:
    admission = Admission(Seats(1, 1), max_wait_seconds=60)

    async with admission.seat(), asyncio.TaskGroup() as tasks:
        waiter = tasks.create_task(sit(admission, asyncio.Event()))
        await asyncio.sleep(0)
        assert admission.seats.queue_depth == 1
        waiter.cancel()

    assert (admission.seats.in_flight, admission.seats.queue_depth) == (0, 0)


async def test_a_seat_goes_to_the_next_when_its_holder_is_cancelled() -> None:
    admission = Admission(Seats(1, 1), max_wait_seconds=60)
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
    admission = Admission(Seats(1, 1), max_wait_seconds=60)

    async with asyncio.TaskGroup() as tasks:
        async with admission.seat():
            waiter = tasks.create_task(sit(admission, asyncio.Event()))
            await asyncio.sleep(0)
        waiter.cancel()

    assert (admission.seats.in_flight, admission.seats.queue_depth) == (0, 0)


async def test_more_seats_than_there_are_will_never_be_free() -> None:
    admission = Admission(Seats(2, 1), max_wait_seconds=60)

    with pytest.raises(InvalidRequest, match="at most 2") as refused:
        async with admission.seat(3):
            raise AssertionError

    assert refused.value.param == "n"


async def test_waiting_has_an_end() -> None:
    admission = Admission(Seats(1, 1), max_wait_seconds=0.01)

    async with admission.seat():
        with pytest.raises(Overloaded, match=r"within 0\.01 seconds"):
            async with admission.seat():
                raise AssertionError

    assert admission.seats.in_flight == 0


async def test_closing_sends_waiters_home_and_lets_the_seated_stay() -> None:
    admission = Admission(Seats(1, 1), max_wait_seconds=60)

    async with admission.seat():
        waiter = asyncio.ensure_future(sit(admission, asyncio.Event()))
        await asyncio.sleep(0)
        admission.close()
        with pytest.raises(ShuttingDown) as refused:
            await waiter

    assert refused.value.retry_after_seconds == 15


async def test_a_closed_door_stays_closed() -> None:
    admission = Admission(Seats(1, 1), max_wait_seconds=60)
    admission.close()

    with pytest.raises(ShuttingDown):
        async with admission.seat():
            raise AssertionError


async def test_who_has_to_give_way_in_the_queue_is_told_why() -> None:
    admission = Admission(Seats(1, 1), max_wait_seconds=60)

    async with admission.seat():
        waiter = asyncio.ensure_future(sit(admission, asyncio.Event()))
        await asyncio.sleep(0)
        async with asyncio.TaskGroup() as tasks:
            urgent = tasks.create_task(sit(admission, asyncio.Event(), priority=1))
            with pytest.raises(Overloaded, match="more urgent") as refused:
                await waiter
            urgent.cancel()

    assert refused.value.extras["queue_depth"] == 1
    assert (admission.seats.in_flight, admission.seats.queue_depth) == (0, 0)
