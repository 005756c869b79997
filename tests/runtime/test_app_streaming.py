"""A stream of events: whole frames, silence broken, a client that does not read cut off."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.runtime.streaming import KEEP_ALIVE, ClientStalled, EventStream


class FakeResponse:
    """Keeps what is written; takes nothing at once while ``reading`` is not set."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.reading = asyncio.Event()
        self.reading.set()

    def write_at_once(self, data: bytes) -> bool:
        """Keep *data* while the client reads."""
        if self.reading.is_set():
            self.written.append(data)
        return self.reading.is_set()

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


async def test_silence_is_broken_and_nothing_is_lost_by_it() -> None:
    gate = asyncio.Event()
    response = Opening(gate, at=KEEP_ALIVE)
    stream = EventStream(response, cut=lambda: None, keep_alive_seconds=0.001)

    seen = [batch async for batch in stream.never_silent(Gated([1, gate, 2]))]

    assert seen == [1, 2]
    assert KEEP_ALIVE in response.written


async def test_batches_that_send_nothing_do_not_put_off_the_next_sign_of_life() -> None:
    gate = asyncio.Event()
    response = Opening(gate, at=KEEP_ALIVE)
    stream = EventStream(response, cut=lambda: None, keep_alive_seconds=0.05)

    async for _ in stream.never_silent(Repeating(gate)):
        pass

    assert response.written == [KEEP_ALIVE]


class Opening(FakeResponse):
    """Sets *gate* once *at* is written."""

    def __init__(self, gate: asyncio.Event, at: bytes) -> None:
        super().__init__()
        self._gate = gate
        self._at = at

    def write_at_once(self, data: bytes) -> bool:
        """Keep *data*."""
        if data == self._at:
            self._gate.set()
        return super().write_at_once(data)


class Repeating(AsyncIterator[int]):
    """Yields at every turn of the loop until *gate* is set."""

    def __init__(self, gate: asyncio.Event) -> None:
        self._gate = gate

    async def __anext__(self) -> int:
        await asyncio.sleep(0)
        if self._gate.is_set():
            raise StopAsyncIteration
        return 1


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
