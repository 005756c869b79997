"""One timer for many waits: each has its own limit, and nobody else's cancellation is taken."""

import asyncio

import pytest

from cortex.runtime.deadline import Deadline


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_wait_that_takes_too_long_is_ended_and_the_next_one_is_not() -> None:
    deadline = Deadline()

    with pytest.raises(TimeoutError), deadline.at(now() + 0.001):
        await asyncio.Event().wait()
    with deadline.at(now() + 60.0):
        await asyncio.sleep(0)

    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_the_limit_of_an_earlier_wait_ends_no_later_one() -> None:
    deadline, later = Deadline(), asyncio.Event()

    with deadline.at(now() + 0.001):
        pass
    with deadline.at(now() + 60.0):
        asyncio.get_running_loop().call_later(0.01, later.set)
        await later.wait()


async def test_an_earlier_limit_comes_earlier() -> None:
    deadline = Deadline()

    with deadline.at(now() + 60.0):
        pass
    with pytest.raises(TimeoutError), deadline.at(now() + 0.001):
        await asyncio.Event().wait()


async def test_time_between_two_waits_ends_none() -> None:
    deadline, later = Deadline(), asyncio.Event()

    with deadline.at(now()):
        pass
    asyncio.get_running_loop().call_later(0.01, later.set)
    await later.wait()
    with deadline.at(now() + 60.0):
        await asyncio.sleep(0)


async def test_a_limit_in_the_past_ends_the_wait_at_once() -> None:
    deadline = Deadline()

    with pytest.raises(TimeoutError), deadline.at(now() - 1.0):
        await asyncio.Event().wait()


async def test_being_cancelled_is_no_timeout() -> None:
    waits = asyncio.Event()

    async def wait() -> None:
        with Deadline().at(now() + 60.0):
            waits.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(wait())
        await waits.wait()
        waiting.cancel()

    assert waiting.cancelled()


async def test_being_cancelled_in_the_turn_of_the_limit_is_no_timeout() -> None:
    async def wait() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        with Deadline().at(now() - 1.0):
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(wait())

    assert waiting.cancelled()


async def test_what_the_block_raises_passes() -> None:
    with pytest.raises(KeyError), Deadline().at(now() + 60.0):
        raise KeyError
