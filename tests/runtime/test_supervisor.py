"""Requests through the supervisor, and its end."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.ipc.errors import (
    Conflict,
    ModelLoading,
    ModelNotFound,
    NodeFailed,
    ShuttingDown,
    Unloadable,
)
from cortex.ipc.messages import Cancel, Embed, EngineReport, Generate
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.ring import Flag
from cortex.runtime.model_state import State
from cortex.runtime.node import Node
from cortex.runtime.supervisor import Supervisor
from supervisor_bench import GREEDY, A, B, Neuron, error_of
from supervisor_fakes import VECTOR, eventually, records


@pytest.fixture
async def neuron() -> AsyncIterator[Neuron]:
    neuron = Neuron()
    async with neuron.supervisor:
        for device in neuron.supervisor.devices:
            await device.become_ready()
        yield neuron


@pytest.fixture
def supervisor(neuron: Neuron) -> Supervisor:
    return neuron.supervisor


async def test_it_is_what_the_routes_are_written_against(supervisor: Supervisor) -> None:
    node: Node = supervisor  # mypy compares the two

    assert node.models == {}


async def test_a_request_gets_the_tokens_of_its_sequence(neuron: Neuron) -> None:
    await neuron.loads(A)
    async with neuron.supervisor.generate(A, [1], GREEDY) as generation:
        got = [record async for batch in generation for record in batch]

    assert got == records(generation.sequence_id, [1, 2, 3], Flag.STOP)


async def test_leaving_a_request_early_cancels_it(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Generate}
    async with neuron.supervisor.generate(A, [1], GREEDY) as generation:
        pass

    await generation.ended.wait()
    assert isinstance(neuron.lives.now().received[-1], Cancel)
    assert neuron.supervisor.devices[0].running == []


async def test_an_embedding_gets_its_vector(neuron: Neuron) -> None:
    await neuron.loads(A)

    assert await neuron.supervisor.embed(A, [1, 2], "last") == VECTOR


async def test_an_embedding_that_nobody_waits_for_is_cancelled(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Embed}
    async with asyncio.TaskGroup() as tasks:
        embedding = tasks.create_task(neuron.supervisor.embed(A, [1], "mean"))
        await eventually(lambda: neuron.supervisor.devices[0].running, "the embedding")
        embedding.cancel()

    assert isinstance(neuron.lives.now().received[-1], Cancel)
    await eventually(lambda: not neuron.supervisor.devices[0].running, "its end")


async def test_an_embedding_of_a_model_that_is_not_there_is_refused(neuron: Neuron) -> None:
    with pytest.raises(ModelNotFound, match="POST /models/load"):
        await neuron.supervisor.embed(A, [1], "mean")


async def test_an_embedding_fails_with_its_device(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Embed}
    async with asyncio.TaskGroup() as tasks:
        embedding = tasks.create_task(error_of(neuron.supervisor.embed(A, [1], "mean")))
        await eventually(lambda: neuron.supervisor.devices[0].running, "the embedding")
        neuron.lives.now().dies()

    assert isinstance(embedding.result(), NodeFailed)


async def test_a_model_is_not_unloaded_under_an_embedding_unless_forced(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Embed}
    async with asyncio.TaskGroup() as tasks:
        embedding = tasks.create_task(error_of(neuron.supervisor.embed(A, [1], "mean")))
        await eventually(lambda: neuron.supervisor.devices[0].running, "the embedding")

        with pytest.raises(Conflict, match="1 requests run"):
            await neuron.supervisor.unload(A)
        await neuron.supervisor.unload(A, force=True)

    assert isinstance(embedding.result(), ModelNotFound)


async def test_a_drain_waits_for_embeddings_and_takes_no_new_ones(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Embed}
    async with asyncio.TaskGroup() as tasks:
        embedding = tasks.create_task(neuron.supervisor.embed(A, [1], "mean"))
        await eventually(lambda: neuron.supervisor.devices[0].running, "the embedding")
        draining = tasks.create_task(neuron.supervisor.drain(60.0))
        await eventually(lambda: neuron.supervisor.is_draining, "the drain")
        with pytest.raises(ShuttingDown):
            await neuron.supervisor.embed(A, [1], "mean")
        assert not draining.done()
        neuron.lives.now().answers(neuron.lives.now().last(Embed))

    assert embedding.result() == VECTOR


async def test_a_model_that_is_not_there_names_the_way_to_load_it(supervisor: Supervisor) -> None:
    with pytest.raises(ModelNotFound, match="POST /models/load"):
        supervisor.generate(A, [1], GREEDY)


async def test_a_model_on_its_way_says_when_to_come_back(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A))

    with pytest.raises(ModelLoading) as loading:
        neuron.supervisor.generate(A, [1], GREEDY)
    assert loading.value.retry_after_seconds == 2


async def test_a_request_for_a_failed_model_tells_why(neuron: Neuron) -> None:
    neuron.files.error = Unloadable("too large", kind="insufficient_memory")
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.FAILED)

    with pytest.raises(ModelNotFound, match="too large"):
        neuron.supervisor.generate(A, [1], GREEDY)


async def test_a_drain_lets_running_requests_finish(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Generate}
    generation = neuron.supervisor.generate(A, [1], GREEDY)
    async with asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(neuron.supervisor.drain(60.0))
        await eventually(lambda: neuron.supervisor.is_draining, "the drain")
        assert not draining.done()
        neuron.lives.now().writes(generation.sequence_id, [1], Flag.STOP)

    assert len(await anext(generation)) == 1


async def test_a_request_that_takes_too_long_ends_with_an_error(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Generate}
    generation = neuron.supervisor.generate(A, [1], GREEDY)
    await neuron.supervisor.drain(0.0)

    with pytest.raises(ShuttingDown, match="took too long"):
        await anext(generation)


async def test_who_waits_for_a_load_is_told_when_the_drain_ends(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(error_of(neuron.supervisor.loaded(A)))
        await neuron.reaches(A, State.DOWNLOADING)
        await neuron.supervisor.drain(0.0)

    assert isinstance(waiting.result(), ShuttingDown)


async def test_nothing_new_is_taken_while_draining(neuron: Neuron) -> None:
    await neuron.loads(A)
    await neuron.supervisor.drain(1.0)

    for refused in (neuron.supervisor.load(LoadRequest(B)), neuron.supervisor.restart_device(0)):
        with pytest.raises(ShuttingDown):
            await refused
    with pytest.raises(ShuttingDown) as error:
        neuron.supervisor.generate(A, [1], GREEDY)
    assert error.value.retry_after_seconds


async def test_the_end_stops_devices_and_answers_everybody() -> None:
    neuron = Neuron()
    async with asyncio.TaskGroup() as tasks, neuron.supervisor:
        await neuron.loads(A)
        neuron.lives.silent_on = {Generate}
        generation = neuron.supervisor.generate(A, [1], GREEDY)
        neuron.files.may_fetch.clear()
        await neuron.supervisor.load(LoadRequest(B))
        waiting = tasks.create_task(error_of(neuron.supervisor.loaded(B)))
        await neuron.reaches(B, State.DOWNLOADING)

    assert isinstance(waiting.result(), ShuttingDown)
    with pytest.raises(NodeFailed):
        await anext(generation)
    assert [device.state for device in neuron.supervisor.devices] == ["stopped", "stopped"]
    assert neuron.files.is_closed


async def test_an_exception_of_the_caller_comes_out_as_it_is() -> None:
    neuron = Neuron()

    with pytest.raises(OSError, match="port taken"):
        async with neuron.supervisor:
            raise OSError("port taken")

    assert [device.state for device in neuron.supervisor.devices] == ["stopped", "stopped"]


async def test_an_exception_nobody_expected_ends_the_supervisor_and_is_not_lost() -> None:
    neuron = Neuron()

    with pytest.RaisesGroup(ZeroDivisionError):
        async with neuron.supervisor:
            await neuron.supervisor.devices[0].become_ready()
            neuron.supervisor.devices[0].on_change = lambda *_: 1 / 0  # type: ignore[assignment] # a bug
            neuron.lives.now(0).dies()
            await asyncio.sleep(30)

    assert neuron.files.is_closed


async def test_a_prefix_cache_is_cleared_of_what_is_loaded_only(neuron: Neuron) -> None:
    with pytest.raises(ModelNotFound):
        await neuron.supervisor.clear_prefix_cache(A)

    await neuron.loads(A)

    assert await neuron.supervisor.clear_prefix_cache(A) == 7


async def test_nothing_is_cleared_while_it_drains(neuron: Neuron) -> None:
    await neuron.loads(A)
    await neuron.supervisor.drain(0.0)

    with pytest.raises(ShuttingDown):
        await neuron.supervisor.clear_prefix_cache(A)


async def test_a_generation_travels_with_its_priority(neuron: Neuron) -> None:
    await neuron.loads(A)

    neuron.supervisor.generate(A, [1], GREEDY, priority=4)

    assert neuron.lives.now().last(Generate) == Generate(2, 2, A, [1], GREEDY, priority=4)


async def test_a_model_knows_what_its_device_said_of_its_engine(neuron: Neuron) -> None:
    await neuron.loads(A)
    assert neuron.supervisor.models[A].engine is None

    report = EngineReport(A, 1, 0, 64, 0, 0, 0)
    neuron.lives.now().says(report)

    assert neuron.supervisor.models[A].engine == report
