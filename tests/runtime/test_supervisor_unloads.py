"""Unloads: of what is loaded, what is on its way, and what is busy."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.ipc.errors import Conflict, ModelNotFound, NodeFailed
from cortex.ipc.messages import Generate, LoadModel, UnloadModel
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.model_state import State
from cortex.runtime.supervisor import Supervisor
from supervisor_bench import GREEDY, A, B, Neuron, error_of
from supervisor_fakes import MIB, eventually, loaded


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


async def test_an_unloaded_model_is_gone_and_its_memory_free(neuron: Neuron) -> None:
    await neuron.loads(A)
    device = neuron.supervisor.devices[0]
    await neuron.supervisor.unload(A)

    assert neuron.lives.now().received[-1] == UnloadModel(2, A)
    assert neuron.supervisor.models == {}
    assert neuron.supervisor.memory.free_bytes(device) == 1024 * MIB
    assert device.cycles == 1


async def test_unloading_what_is_not_there_is_404(supervisor: Supervisor) -> None:
    with pytest.raises(ModelNotFound):
        await supervisor.unload(A)


async def test_unloading_is_refused_while_requests_run(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Generate}
    neuron.supervisor.generate(A, [1], GREEDY)

    with pytest.raises(Conflict, match="1 requests run"):
        await neuron.supervisor.unload(A)


async def test_a_forced_unload_ends_what_runs_with_an_error(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Generate}
    generation = neuron.supervisor.generate(A, [1], GREEDY)
    await neuron.supervisor.unload(A, force=True)

    with pytest.raises(ModelNotFound, match="unloaded by force"):
        await anext(generation)


async def test_an_unload_stops_a_running_download(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.DOWNLOADING)
    await neuron.supervisor.unload(A)

    assert neuron.files.stopped == [A]
    assert neuron.supervisor.models == {}


async def test_an_unload_takes_a_model_out_of_the_queue(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.supervisor.load(LoadRequest(B, devices=[0]))
    await neuron.supervisor.unload(B)
    neuron.files.may_fetch.set()
    await neuron.supervisor.loaded(A)

    assert neuron.files.fetching == [A]


async def test_whoever_waits_for_a_load_is_told_of_its_unload(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(error_of(neuron.supervisor.loaded(A)))
        await neuron.reaches(A, State.DOWNLOADING)
        await neuron.supervisor.unload(A)

    assert isinstance(waiting.result(), ModelNotFound)


async def test_a_model_that_is_being_loaded_is_unloaded_when_the_device_allows(
    neuron: Neuron,
) -> None:
    neuron.lives.silent_on = {LoadModel, UnloadModel}
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.LOADING)
    life = neuron.lives.now()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(neuron.supervisor.unload(A))
        await eventually(lambda: isinstance(life.received[-1], UnloadModel), "the first try")
        life.refuses(life.last(UnloadModel), "model_loading", "still loading")
        command = life.last(LoadModel)
        assert isinstance(command, LoadModel)
        neuron.lives.silent_on = set()
        life.says(loaded(command))

    assert neuron.supervisor.models == {}
    assert [type(command) for command in life.received] == [LoadModel, UnloadModel, UnloadModel]


async def test_a_load_that_fails_while_it_is_unloaded_is_just_gone(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel, UnloadModel}
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.LOADING)
    life = neuron.lives.now()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(neuron.supervisor.unload(A))
        await eventually(lambda: isinstance(life.received[-1], UnloadModel), "the first try")
        life.refuses(life.last(UnloadModel), "model_loading", "still loading")
        life.refuses(life.last(LoadModel), "bad_checkpoint", "torn")

    assert neuron.supervisor.models == {}


async def test_an_unload_that_the_device_refuses_is_told_and_shown(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {UnloadModel}
    life = neuron.lives.now()
    async with asyncio.TaskGroup() as tasks:
        unloading = tasks.create_task(error_of(neuron.supervisor.unload(A)))
        await eventually(lambda: isinstance(life.received[-1], UnloadModel), "UnloadModel")
        life.refuses(life.last(UnloadModel), "internal_error", "a bug")

    assert isinstance(unloading.result(), NodeFailed)
    assert neuron.supervisor.models[A].status == "failed"


async def test_a_model_being_unloaded_is_neither_loaded_nor_unloaded_again(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {UnloadModel}
    life = neuron.lives.now()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(neuron.supervisor.unload(A))
        await neuron.reaches(A, State.UNLOADING)
        with pytest.raises(Conflict):
            await neuron.supervisor.unload(A)
        with pytest.raises(Conflict):
            await neuron.supervisor.load(LoadRequest(A))
        with pytest.raises(ModelNotFound, match="/models/load"):
            neuron.supervisor.generate(A, [1], GREEDY)
        await eventually(lambda: isinstance(life.received[-1], UnloadModel), "UnloadModel")
        life.answers(life.last(UnloadModel))


async def test_a_death_while_unloading_frees_the_memory_too(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {UnloadModel}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(neuron.supervisor.unload(A))
        await neuron.reaches(A, State.UNLOADING)
        await neuron.dies()

    assert neuron.supervisor.models == {}
