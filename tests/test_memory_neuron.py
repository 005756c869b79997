"""The fake neuron with memory keeps its promises: what it says is in the contract."""

from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from cortex.ipc.errors import Recovering, Unloadable
from cortex.ipc.node_api import Health, LoadEstimate, ModelInfo
from memory_neuron import MemoryNeuron


@pytest.fixture
async def neuron() -> AsyncIterator[MemoryNeuron]:
    async with MemoryNeuron(memory_mb=[500, 300], takes_mb={"x": 200, "y": 400}) as neuron:
        yield neuron


async def post(neuron: MemoryNeuron, path: str, **body: object) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(neuron.url + path, json=body) as response,
    ):
        return response.status, await response.read()


async def free(neuron: MemoryNeuron) -> list[int | None]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(neuron.url + "/health") as response,
    ):
        health = msgspec.json.decode(await response.read(), type=Health)
    return [device.vram_free_mb for device in health.devices]


async def test_a_load_takes_memory_of_the_emptiest_device(neuron: MemoryNeuron) -> None:
    await post(neuron, "/models/load", model_id="x")

    assert await free(neuron) == [300, 300]


async def test_a_load_on_several_devices_takes_its_share_of_each(neuron: MemoryNeuron) -> None:
    await post(neuron, "/models/load", model_id="y", tensor_parallel=2)

    assert await free(neuron) == [300, 100]


async def test_what_a_loaded_model_holds_is_shown(neuron: MemoryNeuron) -> None:
    await post(neuron, "/models/load", model_id="x")
    async with (
        aiohttp.ClientSession() as session,
        session.get(neuron.url + "/models") as response,
    ):
        (model,) = msgspec.json.decode(await response.read(), type=list[ModelInfo])

    assert [(held.index, held.weights_mb) for held in model.devices] == [(0, 200)]


async def test_an_unload_gives_it_back(neuron: MemoryNeuron) -> None:
    await post(neuron, "/models/load", model_id="x")
    await post(neuron, "/models/unload", model_id="x")

    assert await free(neuron) == [500, 300]


async def test_what_does_not_fit_is_refused_with_its_numbers(neuron: MemoryNeuron) -> None:
    status, body = await post(neuron, "/models/load", model_id="y", devices=[1])

    error = msgspec.json.decode(body)["error"]
    assert (status, error["kind"], error["weights_bytes"]) == (
        422,
        "insufficient_memory",
        400 * 2**20,
    )


async def test_a_load_that_failed_holds_nothing(neuron: MemoryNeuron) -> None:
    neuron.fails_load = "the disk is full"
    await post(neuron, "/models/load", model_id="x")
    async with aiohttp.ClientSession() as session:
        await session.get(neuron.url + "/models")

    assert await free(neuron) == [500, 300]


async def test_it_estimates_what_it_was_told_to(neuron: MemoryNeuron) -> None:
    unknown, _ = await post(neuron, "/models/estimate", model_id="x")
    neuron.estimates["x"] = LoadEstimate(200, 300)
    known, body = await post(neuron, "/models/estimate", model_id="x")
    neuron.estimates["x"] = Unloadable("no", kind="quant_not_found")
    refused, _ = await post(neuron, "/models/estimate", model_id="x")

    assert (unknown, known, refused) == (404, 200, 422)
    assert msgspec.json.decode(body, type=LoadEstimate) == LoadEstimate(200, 300)


async def test_it_refuses_unloads_as_it_was_told_to(neuron: MemoryNeuron) -> None:
    neuron.refuses_unload = Recovering("not now")

    assert (await post(neuron, "/models/unload", model_id="x"))[0] == 503
