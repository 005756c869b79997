"""Where loads go and what they are judged by, while others are on their way or hold memory."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import LoadModel
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.discovery import Holder
from cortex.runtime.foreign_use import ForeignUse
from cortex.runtime.model_state import State
from supervisor_bench import A, B, Neuron
from supervisor_fakes import FOOTPRINT, MIB, eventually

C = "file:/models/c.gguf"


@pytest.fixture
async def neuron() -> AsyncIterator[Neuron]:
    neuron = Neuron()
    async with neuron.supervisor:
        for device in neuron.supervisor.devices:
            await device.become_ready()
        yield neuron


def place_of(neuron: Neuron, model_id: str) -> int:
    return neuron.supervisor.models[model_id].device.spec.index


@pytest.mark.parametrize("estimate_bytes", [None, 100 * MIB])
async def test_two_loads_at_once_do_not_choose_the_same_memory(
    neuron: Neuron, estimate_bytes: int | None
) -> None:
    neuron.files.estimate_bytes = estimate_bytes
    neuron.files.may_fetch.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(neuron.supervisor.load(LoadRequest(A)))
        tasks.create_task(neuron.supervisor.load(LoadRequest(B)))

    assert {place_of(neuron, A), place_of(neuron, B)} == {0, 1}


async def test_two_that_fit_beside_each_other_share_the_larger_device(neuron: Neuron) -> None:
    neuron.supervisor.memory.foreign_use = lambda device: ForeignUse(
        900 * MIB if device.spec.index == 0 else 0
    )
    neuron.files.estimate_bytes = 100 * MIB
    neuron.files.may_fetch.clear()
    for model_id in (A, B):
        await neuron.supervisor.load(LoadRequest(model_id))

    assert (place_of(neuron, A), place_of(neuron, B)) == (1, 1)


async def test_a_load_is_judged_by_what_is_held_and_not_by_what_is_expected(
    neuron: Neuron,
) -> None:
    await neuron.loads(A)
    neuron.files.estimate_bytes = 800 * MIB
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(B, devices=[0]))
    await neuron.reaches(B, State.LOADING)
    await neuron.supervisor.load(LoadRequest(C, devices=[0]))

    assert neuron.files.examined[-1] == (C, 1024 * MIB - FOOTPRINT.total_bytes)


async def test_an_expectation_ends_with_the_load(neuron: Neuron) -> None:
    neuron.files.estimate_bytes = 800 * MIB
    model = await neuron.loads(A)

    assert neuron.supervisor.memory.free_bytes(model.device) == 1024 * MIB - FOOTPRINT.total_bytes


async def test_a_load_goes_by_what_an_earlier_one_held(neuron: Neuron) -> None:
    await neuron.loads(A)
    await neuron.supervisor.unload(A)
    neuron.files.may_fetch.clear()
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))

    assert neuron.files.measured == [None, None, FOOTPRINT]  # examined, read, examined again
    assert neuron.supervisor.models[A].estimate_bytes == FOOTPRINT.total_bytes


@pytest.mark.parametrize("device_refuses", [True, False])
async def test_a_load_that_does_not_fit_is_told_who_else_has_the_memory(
    neuron: Neuron, device_refuses: bool
) -> None:
    use = ForeignUse(300 * MIB, (Holder(4711, 300 * MIB),))
    neuron.supervisor.memory.foreign_use = lambda _: use
    if device_refuses:
        neuron.lives.silent_on = {LoadModel}
    else:
        neuron.files.error = Unloadable("too large", kind="insufficient_memory", memory_bytes=5)
    await neuron.supervisor.load(LoadRequest(A, devices=[0]))
    if device_refuses:
        await eventually(lambda: neuron.lives.now().received, "the load")
        neuron.lives.now().refuses(
            neuron.lives.now().last(LoadModel), "insufficient_memory", "too large"
        )

    with pytest.raises(Unloadable) as refused:
        await neuron.supervisor.loaded(A)
    assert str(refused.value) == (
        "too large; 300 MB of it are held by other processes: pid 4711 (300 MB)"
    )
    assert refused.value.kind == "insufficient_memory"


async def test_a_load_that_fits_nowhere_is_told_so_before_it_is_queued(neuron: Neuron) -> None:
    neuron.supervisor.memory.foreign_use = lambda _: ForeignUse(300 * MIB)
    neuron.files.verdict = Unloadable("too large", kind="insufficient_memory", memory_bytes=5)

    with pytest.raises(Unloadable, match="taken 300 MB") as refused:
        await neuron.supervisor.load(LoadRequest(A))
    assert refused.value.extras == {"kind": "insufficient_memory", "memory_bytes": 5}


async def test_another_refusal_is_left_as_it_is(neuron: Neuron) -> None:
    neuron.supervisor.memory.foreign_use = lambda _: ForeignUse(300 * MIB)
    neuron.files.verdict = Unloadable("no such quant", kind="quant_not_found")

    with pytest.raises(Unloadable, match=r"^no such quant$"):
        await neuron.supervisor.load(LoadRequest(A))
