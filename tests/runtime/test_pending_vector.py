"""An embedding is waited for once and ends once; who stops waiting cancels it."""

import asyncio

import pytest

from cortex.ipc.errors import NodeFailed
from cortex.runtime.pending_vector import PendingVector


class Pending:
    """A pending vector, and what was cancelled of it."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []
        self.vector = PendingVector(7, "m", self.cancelled.append)


@pytest.fixture
def pending() -> Pending:
    return Pending()


async def test_the_waiter_gets_the_vector(pending: Pending) -> None:
    asyncio.get_running_loop().call_soon(pending.vector.give, b"1234")

    assert await pending.vector.wait() == b"1234"
    assert pending.cancelled == []


async def test_the_waiter_gets_the_failure(pending: Pending) -> None:
    asyncio.get_running_loop().call_soon(pending.vector.fail, NodeFailed("killed"))

    with pytest.raises(NodeFailed, match="killed"):
        await pending.vector.wait()
    assert pending.cancelled == []


async def test_what_has_ended_stays_as_it_ended(pending: Pending) -> None:
    pending.vector.give(b"1234")
    pending.vector.fail(NodeFailed("killed"))
    pending.vector.give(b"5678")

    assert await pending.vector.wait() == b"1234"


async def test_who_stops_waiting_cancels_it_once(pending: Pending) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await pending.vector.wait()
    pending.vector.cancel()

    assert pending.cancelled == [7]
    assert not pending.vector.ended.is_set()


async def test_cancelling_after_the_end_says_nothing(pending: Pending) -> None:
    pending.vector.give(b"1234")
    pending.vector.cancel()

    assert pending.cancelled == []
