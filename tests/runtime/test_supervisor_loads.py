"""Loads: queued, refused, shared, failed, shown."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.ipc.errors import (
    InternalError,
    LoadedDifferently,
    ModelNotFound,
    ShuttingDown,
    Unloadable,
)
from cortex.ipc.messages import LoadModel
from cortex.ipc.node_api import LoadRequest, Progress, Servable
from cortex.runtime import model_loads
from cortex.runtime.model_state import FAILED_SHOWN_SECONDS, State
from cortex.runtime.supervisor import Supervisor
from supervisor_bench import A, B, Neuron, error_of
from supervisor_fakes import FOOTPRINT, MIB, eventually


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


async def test_a_load_is_queued_at_once_and_loaded_in_the_end(supervisor: Supervisor) -> None:
    model = await supervisor.load(LoadRequest(A))
    assert (model.state, model.status) == (State.QUEUED, "loading")

    assert await supervisor.loaded(A) is model
    assert (model.status, model.servable, model.progress) == ("loaded", Servable(ok=True), None)
    assert model.footprints == (FOOTPRINT,)
    assert model.limits is not None
    assert model.limits.max_context_tokens == 2048
    assert model.text is not None


async def test_the_device_is_told_what_was_asked_for(neuron: Neuron) -> None:
    request = LoadRequest(
        A, dtype="bfloat16", devices=[1], max_context_tokens=99, kv_cache_mb=3, max_sequences=2
    )
    await neuron.supervisor.load(request)
    await neuron.supervisor.loaded(A)

    assert neuron.lives.now(1).received == [
        LoadModel(1, A, f"/models/{A}", "bfloat16", 99, 2, 3 * MIB)
    ]


async def test_the_same_load_again_is_the_same_load(neuron: Neuron) -> None:
    one = await neuron.supervisor.load(LoadRequest(A))
    other = await neuron.supervisor.load(LoadRequest(A, harness="candle", tensor_parallel=1))
    await neuron.supervisor.loaded(A)
    third = await neuron.supervisor.load(LoadRequest(A, devices=[0], wait=True))

    assert one is other is third
    assert neuron.files.fetching == [A]


async def test_another_load_of_a_model_that_is_here_is_refused(supervisor: Supervisor) -> None:
    await supervisor.load(LoadRequest(A))

    with pytest.raises(LoadedDifferently, match="dtype and max_sequences"):
        await supervisor.load(LoadRequest(A, dtype="float32", max_sequences=1))
    with pytest.raises(LoadedDifferently, match="is loading with other values of devices: unload"):
        await supervisor.load(LoadRequest(A, devices=[1]))
    with pytest.raises(LoadedDifferently, match="tool_prompt and reasoning_parser"):
        await supervisor.load(LoadRequest(A, tool_prompt="hermes", reasoning_parser="none"))


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (LoadRequest(A, tensor_parallel=3), "too_few_devices"),
        (LoadRequest(A, tensor_parallel=2, devices=[0]), "devices_mismatch"),
        (LoadRequest(A, devices=[2]), "no_such_device"),
        (LoadRequest(A, devices=[]), "no_such_device"),
        (LoadRequest("name"), "source_unsupported"),
    ],
)
async def test_what_cannot_work_is_refused_at_once(
    supervisor: Supervisor, request_: LoadRequest, kind: str
) -> None:
    with pytest.raises(Unloadable) as refused:
        await supervisor.load(request_)

    assert refused.value.kind == kind
    assert supervisor.models == {}


async def test_what_its_headers_say_cannot_work_is_refused_before_anything_is_fetched(
    neuron: Neuron,
) -> None:
    neuron.files.verdict = Unloadable("too large", kind="insufficient_memory")

    with pytest.raises(Unloadable, match="too large"):
        await neuron.supervisor.load(LoadRequest(A))

    assert neuron.files.examined == [(A, 1024 * MIB)]
    assert neuron.supervisor.models == {}


async def test_a_verdict_that_takes_long_is_not_waited_for(
    neuron: Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_loads, "EXAMINE_SECONDS", 0.0)
    neuron.files.may_examine.clear()
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.DOWNLOADING)
    neuron.files.verdict = Unloadable("too large", kind="insufficient_memory")
    neuron.files.may_examine.set()

    with pytest.raises(Unloadable, match="too large"):
        await neuron.supervisor.loaded(A)

    assert neuron.files.fetching == []


async def test_what_was_judged_once_is_not_judged_again(neuron: Neuron) -> None:
    await neuron.loads(A)

    assert len(neuron.files.examined) == 1


async def test_two_who_ask_while_headers_are_read_get_one_load(neuron: Neuron) -> None:
    neuron.files.may_examine.clear()
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(neuron.supervisor.load(LoadRequest(A))) for _ in range(2)]
        await eventually(lambda: len(neuron.files.examined) == 2, "both")
        neuron.files.may_examine.set()
    await neuron.supervisor.loaded(A)

    assert asking[0].result() is asking[1].result()
    assert neuron.files.fetching == [A]


async def test_a_load_that_is_asked_for_before_a_drain_is_refused_after_it(neuron: Neuron) -> None:
    neuron.files.may_examine.clear()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(error_of(neuron.supervisor.load(LoadRequest(A))))
        await eventually(lambda: neuron.files.examined, "the question")
        await neuron.supervisor.drain(0)
        neuron.files.may_examine.set()

    assert isinstance(asking.result(), ShuttingDown)


async def test_loads_on_one_device_take_turns(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.supervisor.load(LoadRequest(B, devices=[0]))
    await neuron.reaches(A, State.DOWNLOADING)
    assert neuron.supervisor.models[B].state is State.QUEUED

    neuron.files.may_fetch.set()
    await neuron.supervisor.loaded(B)
    assert neuron.files.fetching == [A, B]


async def test_loads_on_two_devices_do_not_wait_for_each_other(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    await neuron.supervisor.load(LoadRequest(B, devices=[1]))

    await eventually(lambda: neuron.files.fetching == [A, B], "both downloads")


async def test_a_model_goes_where_most_memory_is_free(neuron: Neuron) -> None:
    first = await neuron.loads(A, device=None)
    second = await neuron.loads(B, device=None)

    assert (first.device.spec.index, second.device.spec.index) == (0, 1)


async def test_a_model_is_judged_by_what_the_others_leave_free(neuron: Neuron) -> None:
    await neuron.loads(A)
    await neuron.loads(B)

    assert neuron.files.read_with == {A: 1024 * MIB, B: 924 * MIB}


async def test_progress_tells_the_phase_and_the_bytes(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    neuron.lives.silent_on = {LoadModel}
    model = await neuron.supervisor.load(LoadRequest(A))
    assert model.progress == Progress("queued")

    await neuron.reaches(A, State.DOWNLOADING)
    neuron.clock.now += 10
    model.report(50, 100)
    assert model.progress == Progress("downloading", 50, 100, eta_seconds=20.0)

    neuron.files.may_fetch.set()
    await neuron.reaches(A, State.LOADING)
    assert model.progress == Progress("loading")


async def test_a_model_that_does_not_fit_has_failed_with_its_reason(neuron: Neuron) -> None:
    neuron.files.error = Unloadable("too large", kind="insufficient_memory")
    await neuron.supervisor.load(LoadRequest(A))

    with pytest.raises(Unloadable, match="too large"):
        await neuron.supervisor.loaded(A)
    model = neuron.supervisor.models[A]
    assert (model.status, model.failure) == ("failed", "too large")
    assert model.servable == Servable(ok=False, reason="failed", detail="too large")


async def test_what_the_device_refuses_has_failed_with_its_code(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.LOADING)
    await eventually(lambda: neuron.lives.now().received, "LoadModel")
    life = neuron.lives.now()
    life.refuses(life.last(LoadModel), "insufficient_memory", "no room", kv_bytes=5)

    with pytest.raises(Unloadable) as refused:
        await neuron.supervisor.loaded(A)
    assert (refused.value.kind, str(refused.value)) == ("insufficient_memory", "no room")
    assert refused.value.extras["kv_bytes"] == 5


async def test_a_bug_in_a_load_is_that_models_failure_only(neuron: Neuron) -> None:
    neuron.files.error = ZeroDivisionError()
    await neuron.supervisor.load(LoadRequest(A))

    with pytest.raises(InternalError):
        await neuron.supervisor.loaded(A)
    neuron.files.error = None
    assert (await neuron.loads(B)).status == "loaded"


async def test_a_failed_model_can_be_loaded_again(neuron: Neuron) -> None:
    neuron.files.error = Unloadable("too large", kind="insufficient_memory")
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.FAILED)
    neuron.files.error = None

    assert (await neuron.loads(A)).status == "loaded"


async def test_a_failed_model_is_shown_for_ten_minutes(neuron: Neuron) -> None:
    neuron.files.error = Unloadable("too large", kind="insufficient_memory")
    await neuron.supervisor.load(LoadRequest(A))
    await neuron.reaches(A, State.FAILED)

    neuron.clock.now += FAILED_SHOWN_SECONDS - 1
    assert list(neuron.supervisor.models) == [A]
    neuron.clock.now += 1
    assert list(neuron.supervisor.models) == []


async def test_waiting_for_what_nobody_asked_for_is_404(supervisor: Supervisor) -> None:
    with pytest.raises(ModelNotFound):
        await supervisor.loaded(A)
