"""What a lost or restarted device means for its requests and its models."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.ipc.errors import Conflict, NodeFailed, Recovering, RouteNotFound, Unloadable
from cortex.ipc.messages import Generate, LoadModel
from cortex.ipc.node_api import LoadRequest, Servable
from cortex.ipc.ring import Flag
from cortex.runtime.model_state import State
from cortex.runtime.supervisor import Supervisor
from supervisor_bench import GREEDY, A, B, Neuron
from supervisor_fakes import eventually, loaded


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


async def test_a_lost_device_ends_its_requests_and_no_others(neuron: Neuron) -> None:
    await neuron.loads(A, device=0)
    await neuron.loads(B, device=1)
    neuron.lives.silent_on = {Generate}
    hit = neuron.supervisor.generate(A, [1], GREEDY)
    spared = neuron.supervisor.generate(B, [1], GREEDY)
    await neuron.dies(0)
    neuron.lives.now(1).writes(spared.sequence_id, [1, 2], Flag.STOP)

    with pytest.raises(NodeFailed, match="SIGKILL"):
        await anext(hit)
    assert len(await anext(spared)) == 2


async def test_the_models_of_a_lost_device_come_back_as_they_were(neuron: Neuron) -> None:
    await neuron.supervisor.load(LoadRequest(A, max_sequences=3, devices=[0]))
    model = await neuron.supervisor.loaded(A)
    first = neuron.lives.now().received[0]
    await neuron.dies()
    await neuron.reaches(A, State.LOADED)

    assert isinstance(first, LoadModel)
    again = neuron.lives.now().received[0]
    assert isinstance(again, LoadModel)
    assert (again.model, again.path, again.max_sequences) == (A, first.path, 3)
    assert neuron.supervisor.models[A] is model
    assert neuron.files.fetching == [A]


async def test_a_download_does_not_keep_a_lost_model_from_coming_back(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(B, devices=[0]))
    await neuron.reaches(B, State.DOWNLOADING)
    await neuron.dies()

    await neuron.reaches(A, State.LOADED)
    assert neuron.supervisor.models[B].state is State.DOWNLOADING


async def test_a_recovering_model_asks_for_patience(neuron: Neuron) -> None:
    model = await neuron.loads(A)
    neuron.lives.silent_on = {LoadModel}
    await neuron.dies()
    await eventually(lambda: model.device.is_ready, "the restart")

    assert (model.status, model.servable) == (
        "recovering",
        Servable(ok=False, reason="recovering"),
    )
    with pytest.raises(Recovering) as recovering:
        neuron.supervisor.generate(A, [1], GREEDY)
    assert recovering.value.retry_after_seconds == 2


async def test_a_model_that_does_not_come_back_has_failed(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {LoadModel}
    await neuron.dies()
    await eventually(lambda: neuron.lives.now().received, "LoadModel")
    neuron.lives.now().refuses(neuron.lives.now().last(LoadModel), "load_failed", "file is gone")

    await neuron.reaches(A, State.FAILED)
    assert neuron.supervisor.models[A].failure == "file is gone"


async def test_a_device_that_dies_in_a_recovery_is_tried_again(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {LoadModel}
    await neuron.dies()
    await eventually(lambda: neuron.lives.now().received, "LoadModel")
    neuron.lives.silent_on = set()
    await neuron.dies()

    await neuron.reaches(A, State.LOADED)


async def test_a_device_that_dies_in_a_first_load_has_failed_that_model(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await eventually(lambda: neuron.lives.now().received, "LoadModel")
    neuron.lives.now().dies()

    with pytest.raises(NodeFailed, match="was loaded, it was killed by SIGKILL"):
        await neuron.supervisor.loaded(A)


async def test_a_device_that_dies_before_the_load_gets_it_in_its_next_life(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.dies()
    neuron.files.may_fetch.set()

    assert (await neuron.supervisor.loaded(A)).status == "loaded"


async def test_an_answer_read_after_the_death_does_not_count(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    life = neuron.lives.now()
    await eventually(lambda: life.received, "LoadModel")
    command = life.last(LoadModel)
    assert isinstance(command, LoadModel)
    life.dies()
    asyncio.get_running_loop().call_soon(life.says, loaded(command))

    with pytest.raises(NodeFailed):
        await neuron.supervisor.loaded(A)


async def test_the_models_of_a_poisoned_device_are_not_servable(neuron: Neuron) -> None:
    model = await neuron.loads(A)
    await neuron.dies(times=4)

    assert neuron.supervisor.devices[0].state == "poisoned"
    assert model.servable == Servable(
        ok=False, reason="device_poisoned", detail="it was killed by SIGKILL"
    )
    with pytest.raises(NodeFailed, match="given up"):
        neuron.supervisor.generate(A, [1], GREEDY)
    with pytest.raises(NodeFailed, match="given up"):
        await neuron.supervisor.loaded(A)


async def test_nothing_is_loaded_on_a_poisoned_device(neuron: Neuron) -> None:
    await neuron.dies(times=4)

    with pytest.raises(Unloadable) as refused:
        await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    assert refused.value.kind == "device_poisoned"
    assert (await neuron.loads(B, device=None)).device.spec.index == 1


async def test_without_any_healthy_device_a_load_is_refused(neuron: Neuron) -> None:
    await neuron.dies(0, times=4)
    await neuron.dies(1, times=4)

    with pytest.raises(Unloadable, match="cpu:0 was given up"):
        await neuron.supervisor.load(LoadRequest(A))


async def test_a_neuron_without_devices_loads_nothing() -> None:
    neuron = Neuron(devices=0)
    async with neuron.supervisor:
        with pytest.raises(Unloadable) as refused:
            await neuron.supervisor.load(LoadRequest(A))

    assert refused.value.kind == "no_such_device"


async def test_a_restarted_device_has_another_process_and_its_models(neuron: Neuron) -> None:
    model = await neuron.loads(A)
    before = model.device.pid
    await neuron.supervisor.restart_device(0)
    await neuron.reaches(A, State.LOADED)

    assert model.device.pid != before


async def test_a_poisoned_device_can_be_restarted(neuron: Neuron) -> None:
    await neuron.loads(A)
    await neuron.dies(times=4)
    await neuron.supervisor.restart_device(0)

    await neuron.reaches(A, State.LOADED)


async def test_a_busy_device_is_restarted_by_force_only(neuron: Neuron) -> None:
    await neuron.loads(A)
    neuron.lives.silent_on = {Generate}
    generation = neuron.supervisor.generate(A, [1], GREEDY)
    with pytest.raises(Conflict, match="1 requests run"):
        await neuron.supervisor.restart_device(0)

    await neuron.supervisor.restart_device(0, force=True)

    with pytest.raises(NodeFailed, match="restarted by an operator"):
        await anext(generation)


async def test_a_device_that_loads_a_model_is_busy(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.reaches(A, State.LOADING)

    with pytest.raises(Conflict, match="on the way"):
        await neuron.supervisor.restart_device(0)


async def test_a_device_that_does_not_exist_is_404(supervisor: Supervisor) -> None:
    with pytest.raises(RouteNotFound):
        await supervisor.restart_device(7)
