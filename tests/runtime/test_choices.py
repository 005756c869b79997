"""The sequences of one request, read as one stream: nothing lost, nothing left running."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from cortex.ipc.errors import NodeFailed, Recovering
from cortex.runtime.choices import generating
from fake_node import FakeGeneration, Step, record, says


class Started:
    """Starts generations that play *scripts*, in turn; an exception is raised at the start."""

    def __init__(self, *scripts: Sequence[Step] | Exception) -> None:
        self.scripts = scripts
        self.running: list[FakeGeneration] = []

    def __call__(self, index: int) -> FakeGeneration:
        script = self.scripts[index]
        if isinstance(script, Exception):
            raise script
        self.running.append(FakeGeneration(script))
        return self.running[-1]

    @property
    def cancelled(self) -> list[bool]:
        """Which were cancelled."""
        return [generation.cancelled.is_set() for generation in self.running]


async def collected(start: Started) -> dict[int, list[Any]]:
    """Return the batches of every choice."""
    found: dict[int, list[Any]] = {index: [] for index in range(len(start.scripts))}
    async with generating(len(start.scripts), start) as choices:
        async for index, records in choices:
            found[index].append(records)
    return found


@pytest.mark.parametrize("texts", [["One."], ["One.", "Two of them.", ""], ["a"] * 8])
async def test_every_batch_comes_once_and_in_the_order_of_its_choice(texts: list[str]) -> None:
    scripts = [says(text) for text in texts]

    assert await collected(Started(*scripts)) == dict(enumerate(scripts))


async def test_choices_come_as_they_form() -> None:
    gate = asyncio.Event()

    async with generating(2, Started([gate, *says("slow")], says("quick"))) as choices:
        first = [await anext(choices) for _ in says("quick")]
        gate.set()
        rest = [batch async for batch in choices]

    assert {index for index, _ in first} == {1}
    assert {index for index, _ in rest} == {0}


async def test_one_that_fails_fails_all_and_the_others_are_cancelled() -> None:
    start = Started([asyncio.Event(), *says("never")], [*says("a", None), NodeFailed("died")])

    with pytest.raises(NodeFailed, match="died"):
        await collected(start)

    assert start.cancelled == [True, False]


async def test_one_that_cannot_start_ends_those_that_have_started() -> None:
    start = Started([asyncio.Event()], Recovering("not now"))

    with pytest.raises(Recovering):
        await collected(start)

    assert start.cancelled == [True]


async def test_who_leaves_early_leaves_nothing_running() -> None:
    start = Started([asyncio.Event()], [asyncio.Event()])

    async with generating(2, start):
        pass

    assert start.cancelled == [True, True]


async def test_what_the_reader_raises_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with generating(2, Started(says("a"), says("b"))):
            raise ZeroDivisionError


async def test_a_reader_that_is_cancelled_cancels_all() -> None:
    start, waiting = Started([asyncio.Event()], [asyncio.Event()]), asyncio.Event()

    async def read() -> None:
        async with generating(2, start) as choices:
            waiting.set()
            await anext(choices)

    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read())
        await waiting.wait()
        reading.cancel()

    assert reading.cancelled()
    assert start.cancelled == [True, True]


async def test_a_wait_that_is_given_up_loses_nothing() -> None:
    gate = asyncio.Event()

    async with generating(2, Started([gate, *says("a")], [gate, *says("b")])) as choices:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(choices)
        gate.set()
        batches = [batch async for batch in choices]

    assert len(batches) == len(says("a")) + len(says("b"))


@pytest.mark.parametrize("count", [1, 2])
async def test_one_choice_can_be_ended_alone(count: int) -> None:
    scripts: list[list[Step]] = [[[record(5)], asyncio.Event()] for _ in range(count)]
    start = Started(*scripts)

    async with generating(count, start) as choices:
        await anext(choices)
        choices.cancel(0)
        assert start.cancelled == [True, *[False] * (count - 1)]
