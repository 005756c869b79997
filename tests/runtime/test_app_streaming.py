"""A stream of events: whole frames, silence broken, a client that does not read cut off."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.runtime.streaming import ClientStalled, EventStream, batches_and_silences


class FakeResponse:
    """Keeps what is written; takes nothing while ``reading`` is not set."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.reading = asyncio.Event()
        self.reading.set()

    async def write(self, data: bytes) -> None:
        """Keep *data*."""
        self.written.append(data)
        await self.reading.wait()


async def test_an_event_is_one_whole_frame() -> None:
    response = FakeResponse()
    stream = EventStream(response, cut=lambda: None)

    await stream.send({"a": 1})
    await stream.comment("usage", {"b": 2})

    assert response.written == [b'data: {"a":1}\n\n', b': usage {"b":2}\n\n']


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    response = FakeResponse()
    response.reading.clear()
    cut = asyncio.Event()
    stream = EventStream(response, cut.set, patience_seconds=0.01)

    with pytest.raises(ClientStalled):
        await stream.write(b"x")

    assert cut.is_set()


async def test_a_slow_client_is_waited_for() -> None:
    response = FakeResponse()
    response.reading.clear()
    stream = EventStream(response, cut=lambda: None, patience_seconds=60)

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(stream.write(b"x"))
        await asyncio.sleep(0)
        assert not writing.done()
        response.reading.set()

    assert response.written == [b"x"]


async def test_silence_is_noticed_and_nothing_is_lost_by_it() -> None:
    gate = asyncio.Event()
    seen: list[int | None] = []

    async for batch in batches_and_silences(Gated([1, gate, 2]), lambda: 0.001):
        seen.append(batch)
        if batch is None:
            gate.set()

    assert [batch for batch in seen if batch is not None] == [1, 2]
    assert None in seen


async def test_batches_that_send_nothing_do_not_put_off_the_next_sign_of_life() -> None:
    never = asyncio.Event()
    left = iter([60.0, 60.0, 0.0])  # seconds until one is due, as the batches come

    seen = batches_and_silences(Gated([1, 2, never]), lambda: next(left))

    assert [await anext(seen) for _ in range(3)] == [1, 2, None]


class Gated(AsyncIterator[int]):
    """Yields numbers and waits for events between; cancelling a wait loses nothing."""

    def __init__(self, steps: list[int | asyncio.Event]) -> None:
        self._steps = steps

    async def __anext__(self) -> int:
        while self._steps and isinstance(gate := self._steps[0], asyncio.Event):
            await gate.wait()
            self._steps.pop(0)
        if not self._steps:
            raise StopAsyncIteration
        step = self._steps.pop(0)
        assert isinstance(step, int)
        return step
