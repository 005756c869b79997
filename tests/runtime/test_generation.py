"""A generation: everything it is given reaches its reader, and it ends once."""

import asyncio

import pytest

from cortex.ipc.errors import InvalidRequest, NodeFailed
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.generation import FULL_RECORDS, LIMIT_RECORDS, Generation
from supervisor_fakes import records


class Sequence:
    """A generation and the cancellations it asked for."""

    def __init__(self, patience_seconds: float = 30.0) -> None:
        self.cancelled: list[int] = []
        self.generation = Generation(
            7, "m", self.cancelled.append, patience_seconds=patience_seconds
        )

    def add(self, token_ids: list[int], finish: Flag | None = None) -> None:
        self.generation.add(records(7, token_ids, finish))


async def read(generation: Generation) -> list[TokenRecord]:
    return [record async for batch in generation for record in batch]


@pytest.fixture
def sequence() -> Sequence:
    return Sequence()


async def test_the_reader_gets_all_records_in_order_and_then_the_end(sequence: Sequence) -> None:
    sequence.add([1, 2])
    sequence.add([3], Flag.STOP)

    assert await read(sequence.generation) == records(7, [1, 2, 3], Flag.STOP)


async def test_the_reader_waits_for_what_comes_later(sequence: Sequence) -> None:
    asyncio.get_running_loop().call_soon(sequence.add, [1], Flag.LENGTH)

    assert await read(sequence.generation) == records(7, [1], Flag.LENGTH)


async def test_a_reader_that_stopped_waiting_loses_nothing(sequence: Sequence) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(sequence.generation), 0)
    sequence.add([1], Flag.STOP)

    assert await read(sequence.generation) == records(7, [1], Flag.STOP)


async def test_a_failure_comes_after_what_was_buffered(sequence: Sequence) -> None:
    sequence.add([1, 2])
    sequence.generation.fail(NodeFailed("gone"))

    assert await anext(sequence.generation) == records(7, [1, 2])
    with pytest.raises(NodeFailed, match="gone"):
        await anext(sequence.generation)


async def test_a_failure_wakes_a_waiting_reader(sequence: Sequence) -> None:
    asyncio.get_running_loop().call_soon(sequence.generation.fail, NodeFailed("gone"))

    with pytest.raises(NodeFailed):
        await read(sequence.generation)


async def test_a_failure_after_the_finish_changes_nothing(sequence: Sequence) -> None:
    sequence.add([1], Flag.STOP)
    sequence.generation.fail(NodeFailed("gone"))

    assert await read(sequence.generation) == records(7, [1], Flag.STOP)


async def test_records_after_a_failure_are_dropped(sequence: Sequence) -> None:
    sequence.generation.fail(NodeFailed("gone"))
    sequence.add([1], Flag.STOP)

    with pytest.raises(NodeFailed):
        await read(sequence.generation)


async def test_the_first_of_two_failures_counts(sequence: Sequence) -> None:
    sequence.generation.fail(NodeFailed("first"))
    sequence.generation.fail(NodeFailed("second"))

    with pytest.raises(NodeFailed, match="first"):
        await read(sequence.generation)


async def test_cancelling_is_asked_for_once_and_ends_with_the_finish(sequence: Sequence) -> None:
    sequence.generation.cancel()
    sequence.generation.cancel()
    sequence.add([1], Flag.CANCELLED)

    assert sequence.cancelled == [7]
    assert await read(sequence.generation) == records(7, [1], Flag.CANCELLED)


async def test_cancelling_what_has_ended_asks_for_nothing(sequence: Sequence) -> None:
    sequence.add([1], Flag.STOP)
    sequence.generation.cancel()

    assert sequence.cancelled == []


async def test_leaving_the_context_cancels_what_still_runs(sequence: Sequence) -> None:
    async with sequence.generation:
        sequence.add([1])

    assert sequence.cancelled == [7]


async def test_a_full_buffer_goes_on_taking_while_the_reader_may_still_come(
    sequence: Sequence,
) -> None:
    sequence.add([1] * FULL_RECORDS)
    sequence.add([2], Flag.STOP)

    assert len(await read(sequence.generation)) == FULL_RECORDS + 1


async def test_a_reader_that_takes_nothing_from_a_full_buffer_is_given_up() -> None:
    sequence = Sequence(patience_seconds=0.0)

    sequence.add([1] * FULL_RECORDS)
    await sequence.generation.ended.wait()

    assert sequence.cancelled == [7]
    assert len(await anext(sequence.generation)) == FULL_RECORDS
    with pytest.raises(InvalidRequest, match="not read"):
        await anext(sequence.generation)


async def test_a_reader_that_comes_back_in_time_is_not_given_up() -> None:
    sequence = Sequence(patience_seconds=0.0)

    sequence.add([1] * FULL_RECORDS)
    await anext(sequence.generation)
    await asyncio.sleep(0)  # the timer would have fired by now
    await asyncio.sleep(0)

    assert not sequence.generation.ended.is_set()


async def test_a_finished_answer_waits_for_its_reader_for_as_long_as_it_takes() -> None:
    sequence = Sequence(patience_seconds=0.0)

    sequence.add([1] * FULL_RECORDS, Flag.STOP)
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert len(await read(sequence.generation)) == FULL_RECORDS


async def test_a_buffer_never_grows_beyond_its_limit(sequence: Sequence) -> None:
    for _ in range(2 * LIMIT_RECORDS // FULL_RECORDS):
        sequence.add([1] * FULL_RECORDS)

    assert sequence.cancelled == [7]
    assert len(await anext(sequence.generation)) == LIMIT_RECORDS
    with pytest.raises(InvalidRequest):
        await anext(sequence.generation)
