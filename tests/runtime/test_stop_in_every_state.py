"""SIGTERM in every state of a device and of a model: it ends, everybody is answered, nobody waits.

``serving.py`` turns SIGTERM into ``drain`` and the end of the supervisor's context; these are the
rows of both tables, ``tests/e2e/test_sigterm.py`` sends the signal itself.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cortex.ipc.errors import ApiError, ModelNotFound, ShuttingDown
from cortex.ipc.messages import Generate, LoadModel, Shutdown, UnloadModel
from cortex.ipc.node_api import LoadRequest
from cortex.runtime import supervisor as supervisor_module
from cortex.runtime.device_state import State as DeviceState
from cortex.runtime.model_state import State
from supervisor_bench import GREEDY, A, Neuron, error_of
from supervisor_fakes import FakeDeviceProcess, eventually

Reach = Callable[[Neuron], Awaitable[None]]


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device process that ignores its Shutdown is killed soon."""
    monkeypatch.setattr(supervisor_module, "STOP_GRACE_SECONDS", 0.05)


async def be_ready(neuron: Neuron) -> None:
    await neuron.supervisor.devices[0].become_ready()


async def queued(neuron: Neuron) -> None:
    await be_ready(neuron)
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest("file:/models/first.gguf", devices=[0]))
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))


async def downloading(neuron: Neuron) -> None:
    await be_ready(neuron)
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.reaches(A, State.DOWNLOADING)


async def loading(neuron: Neuron) -> None:
    await be_ready(neuron)
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.reaches(A, State.LOADING)


async def loaded(neuron: Neuron) -> None:
    await be_ready(neuron)
    await neuron.loads(A)


async def recovering(neuron: Neuron) -> None:
    await loaded(neuron)
    neuron.lives.silent_on = {LoadModel}
    await neuron.dies()
    await neuron.reaches(A, State.RECOVERING)


async def unloading(neuron: Neuron) -> None:
    await loaded(neuron)
    neuron.lives.silent_on = {UnloadModel}
    neuron.under_way.append(asyncio.ensure_future(error_of(neuron.supervisor.unload(A))))
    await neuron.reaches(A, State.UNLOADING)


async def failed(neuron: Neuron) -> None:
    await be_ready(neuron)
    neuron.files.error = OSError("injected")
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.reaches(A, State.FAILED)


@pytest.mark.parametrize(
    ("reach", "answer"),
    [
        (queued, ShuttingDown),
        (downloading, ShuttingDown),
        (loading, ShuttingDown),
        (loaded, type(None)),
        (recovering, ShuttingDown),
        (unloading, ModelNotFound),
        (failed, ApiError),
    ],
)
async def test_a_model_in_any_state_lets_the_neuron_end_and_its_waiters_know(
    reach: Reach, answer: type[BaseException | None]
) -> None:
    neuron = Neuron(devices=1)
    async with asyncio.timeout(20), neuron.supervisor:
        await reach(neuron)
        waiting = asyncio.ensure_future(error_of(neuron.supervisor.loaded(A)))
        await neuron.supervisor.drain(0.0)

    await asyncio.gather(*neuron.under_way)
    assert isinstance(await waiting, answer)
    assert [device.state for device in neuron.supervisor.devices] == ["stopped"]
    assert len(asyncio.all_tasks()) == 1


async def starting(neuron: Neuron) -> None:
    pass


async def restarting(neuron: Neuron) -> None:
    await be_ready(neuron)
    device = neuron.supervisor.devices[0]
    device._backoff = lambda _: 3600.0
    neuron.lives.now().dies()
    await eventually(lambda: device.state == "restarting", "the back-off")


async def poisoned(neuron: Neuron) -> None:
    await be_ready(neuron)
    await neuron.dies(times=4)


async def stopping(neuron: Neuron) -> None:
    await be_ready(neuron)
    neuron.lives.silent_on = {Shutdown}
    neuron.under_way.append(asyncio.ensure_future(neuron.supervisor.devices[0].stop(3600.0)))
    await eventually(
        lambda: neuron.supervisor.devices[0]._state is DeviceState.STOPPING, "the stop"
    )


async def deaf(neuron: Neuron) -> None:
    await be_ready(neuron)
    neuron.lives.silent_on = {Shutdown}


@pytest.mark.parametrize("reach", [starting, be_ready, restarting, poisoned, stopping, deaf])
async def test_a_device_in_any_state_lets_the_neuron_end(reach: Reach) -> None:
    neuron = Neuron(devices=1)
    async with asyncio.timeout(20), neuron.supervisor:
        await reach(neuron)
        await neuron.supervisor.drain(0.0)

    assert [device.state for device in neuron.supervisor.devices] == ["stopped"]
    await asyncio.gather(*neuron.under_way)
    assert len(asyncio.all_tasks()) == 1


async def test_a_stream_on_a_device_that_hangs_is_answered_by_the_stop() -> None:
    neuron = Neuron(devices=1)
    async with asyncio.timeout(20), neuron.supervisor:
        await loaded(neuron)
        neuron.lives.silent_on = {Generate, Shutdown}
        stream = neuron.supervisor.generate(A, [1], GREEDY)
        life: FakeDeviceProcess = neuron.lives.now()
        await eventually(lambda: life.received[-1:] != [], "the request")
        await neuron.supervisor.drain(0.0)

        with pytest.raises(ShuttingDown):
            await anext(stream)
