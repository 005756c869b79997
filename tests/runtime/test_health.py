"""What a neuron says of itself, from memory: health, discovery, readings, activation, versions."""

import asyncio
import os
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import EngineReport, Footprint
from cortex.ipc.node_api import LoadRequest, Refusal
from cortex.runtime.activation import Activation
from cortex.runtime.config import AdmissionConfig, DeviceSpec
from cortex.runtime.discovery import Gpu, ProbeFailed, Reading
from cortex.runtime.foreign_use import ForeignUse
from cortex.runtime.health import Report, capabilities, model_info
from cortex.runtime.readings import Readings
from cortex.runtime.served_model import Limits
from cortex.runtime.traffic import Rates, Traffics
from cortex.runtime.version import Build
from fake_node import FakeDevice, FakeModel, FakeNode, FakeProbe, says, serving
from fakes import until

MIB = 2**20
H200 = Gpu(0, "NVIDIA H200", "GPU-a", 140_000 * MIB, "9.0")


class FakeClock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(node: FakeNode, probe: FakeProbe | None = None, **more: Any) -> Report:
    """Return the report of *node*."""
    probe = probe or FakeProbe()
    inventory = probe.inventory()
    parts: dict[str, Any] = {
        "inventory": inventory,
        "readings": Readings(probe, inventory, node.devices),
        "activation": Activation([]),
        "traffics": Traffics(AdmissionConfig()),
    }
    return Report(node, **(parts | more))


def test_uptime_counts_from_the_start() -> None:
    clock = FakeClock()
    of = report(FakeNode(), clock=clock)

    clock.now += 12.5

    assert of.health().uptime_secs == 12.5


def test_a_device_says_how_often_and_why_it_was_lost() -> None:
    node = FakeNode("m")
    node.devices[0].losses = {"died": 2, "hung": 1}
    node.devices[0].failure = "it hung"

    [device] = report(node).health().devices

    assert (device.restarts, device.restarts_by_cause) == (3, {"died": 2, "hung": 1})
    assert device.last_failure == "it hung"


async def test_a_device_says_what_others_hold_of_it() -> None:
    node = FakeNode("m")
    readings = Readings(FakeProbe(), FakeProbe().inventory(), node.devices)
    of = report(node, readings=readings)
    assert of.health().devices[0].foreign_mb is None
    readings._foreign["cpu:0"] = ForeignUse(300 * MIB)

    assert of.health().devices[0].foreign_mb == 300


def test_no_model_is_servable_while_the_neuron_drains() -> None:
    of = report(FakeNode("m"))
    assert of.models()[0].servable.ok
    of.is_draining = True

    assert (of.models()[0].status, of.models()[0].servable.reason) == ("loaded", "draining")


def test_a_model_shows_its_seats_and_its_memory() -> None:
    node = FakeNode("m")
    traffics = Traffics(AdmissionConfig(max_in_flight=3, max_queue_depth=5))

    load = report(node, traffics=traffics).health().models[0]

    assert (load.max_in_flight, load.max_queue_depth) == (3, 5)
    assert (load.kv_budget_mb, load.kv_available_mb) == (40, 40)


def test_running_requests_take_from_the_available_cache() -> None:
    node = FakeNode("m")
    of = report(node)
    node.models["m"].engine = EngineReport("m", 3, 2, 512, 4, 10, 9)

    [load] = of.health().models

    assert (load.kv_budget_mb, load.kv_available_mb) == (40, 20)
    assert (load.kv_total_tokens, load.kv_free_tokens) == (1024, 512)
    assert (load.running, load.waiting, load.preemptions) == (3, 2, 4)
    assert (load.drafted_tokens, load.accepted_tokens) == (10, 9)


@pytest.mark.parametrize(("configured", "seats"), [(3, 3), (32, 8)])
def test_there_are_as_many_seats_as_the_device_computes_sequences(
    configured: int, seats: int
) -> None:
    traffics = Traffics(AdmissionConfig(max_in_flight=configured))

    load = report(FakeNode("m"), traffics=traffics).health().models[0]

    assert load.max_in_flight == seats


async def test_a_full_model_is_not_servable_and_says_so_with_numbers() -> None:
    node = FakeNode("m", "other")
    traffics = Traffics(AdmissionConfig(max_in_flight=1, max_queue_depth=0))
    of = report(node, traffics=traffics)

    async with traffics.of(node.models["m"]).admission.seat():
        servable = of.models()[0].servable
        other = of.models()[1].servable

    assert (servable.ok, servable.reason) == (False, "overloaded")
    assert servable.detail == (
        "1 of 1 seats are taken, 0 of 0 places in the queue; "
        "1024 of 1024 tokens of KV cache are free"
    )
    assert other.ok
    assert of.models()[0].servable.ok


def test_a_model_without_numbers_yet_has_no_cache() -> None:
    node = FakeNode("m")
    node.models["m"].limits = Limits(512, 8, 0)

    assert report(node).health().models[0].kv_budget_mb == 0


def test_only_models_that_serve_or_will_again_have_a_load() -> None:
    node = FakeNode("a", "b", "c")
    node.models["b"].status = "loading"
    node.models["c"].status = "recovering"

    assert [model.id for model in report(node).health().models] == ["a", "c"]


def test_a_model_that_was_loaded_anew_begins_anew() -> None:
    node = FakeNode("m")
    traffics = Traffics(AdmissionConfig())
    traffics.of(node.models["m"]).rates.decoded(10, 1.0)
    node.models["m"] = FakeModel(LoadRequest("m"), node.devices[:1])

    assert report(node, traffics=traffics).health().models[0].tok_s_decode == 0.0


def test_a_model_that_comes_while_draining_admits_nobody() -> None:
    traffics = Traffics(AdmissionConfig())
    node = FakeNode("m")

    traffics.close()
    traffics.of(node.models["m"])
    traffics.forget_all_but(frozenset())

    assert report(node, traffics=traffics).health().models[0].in_flight == 0


def test_speeds_are_moving_means_that_ignore_what_says_nothing() -> None:
    rates = Rates()

    rates.prefilled(100, 1.0)
    rates.prefilled(200, 1.0)
    rates.prefilled(0, 1.0)
    rates.decoded(10, 0.0)

    assert rates.prefill == pytest.approx(120.0)
    assert rates.decode == 0.0


async def test_speeds_are_measured_from_requests() -> None:
    node = FakeNode("m")
    node.script = says("a longer answer")

    async with serving(node) as client:
        body = {"model": "m", "prompt": "Hello"}
        async with client.post("/v1/completions", json=body) as response:
            assert response.status == 200
        async with client.get("/health") as response:
            load = (await response.json())["models"][0]

    assert load["tok_s_prefill"] > 0
    assert load["tok_s_decode"] > 0
    assert (load["in_flight"], load["kv_available_mb"]) == (0, 40)


async def test_a_cpu_device_uses_what_its_process_holds_of_its_budget() -> None:
    node = FakeNode()
    budget_mb = 1 << 20  # more than this process may have come to in the tests before
    spec = msgspec.structs.replace(node.devices[0].spec, memory_bytes=budget_mb << 20)
    node.devices[0] = FakeDevice(spec, pid=os.getpid())
    of = report(node)

    assert of.health().devices[0].vram_used_mb is None
    await of_readings(of).refresh()

    device = of.health().devices[0]
    assert device.vram_used_mb is not None
    assert device.vram_used_mb > 0
    assert device.vram_free_mb is not None
    assert device.vram_used_mb + device.vram_free_mb in {budget_mb - 1, budget_mb}


def of_readings(of: Report) -> Readings:
    """Return the readings that a report looks at."""
    return of._readings


async def test_a_device_without_a_process_has_no_reading() -> None:
    of = report(FakeNode())

    await of_readings(of).refresh()

    assert of.health().devices[0].vram_used_mb is None


def gpu_node() -> FakeNode:
    """Return a node with one GPU."""
    node = FakeNode()
    node.devices = [FakeDevice(DeviceSpec(0, "cuda:0", H200.memory_bytes))]
    return node


async def test_the_last_good_reading_of_a_gpu_is_kept() -> None:
    probe = FakeProbe(H200)
    of = report(gpu_node(), probe)
    probe.readings[0] = Reading(10 * MIB, 90 * MIB, 55, 61)
    await of_readings(of).refresh()
    probe.readings[0] = ProbeFailed("the GPU is lost")

    with capture_logs() as lines:
        await of_readings(of).refresh()

    device = of.health().devices[0]
    assert (device.vram_used_mb, device.vram_free_mb) == (10, 90)
    assert (device.utilization_pct, device.temp_c) == (55, 61)
    assert lines[0]["event"] == "device not read"


async def test_readings_are_kept_fresh() -> None:
    probe = FakeProbe(H200)
    of = report(gpu_node(), probe)
    task = asyncio.ensure_future(of_readings(of).keep_fresh(every_seconds=0.001))

    probe.readings[0] = Reading(1 * MIB)
    await until(lambda: of.health().devices[0].vram_used_mb == 1)
    probe.readings[0] = Reading(2 * MIB)
    await until(lambda: of.health().devices[0].vram_used_mb == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert task.cancelled()


def test_discovery_names_the_gpus() -> None:
    device = report(gpu_node(), FakeProbe(H200)).discovery().devices[0]

    assert (device.name, device.vram_total_mb) == ("NVIDIA H200", 140_000)
    assert device.compute_capability == "9.0"


async def test_discovery_says_why_there_is_no_gpu() -> None:
    async with serving(FakeNode()) as client, client.get("/discovery") as response:
        body = await response.json()

    assert body["cuda_unavailable_reason"] == "no NVIDIA driver is installed"
    assert body["harnesses"] == ["torch"]
    assert body["devices"] == [
        {"index": 0, "name": "cpu:0", "vram_total_mb": 1024, "compute_capability": None}
    ]


async def test_models_of_the_configuration_are_loaded_one_after_the_other() -> None:
    node = FakeNode()
    node.load_may_end.clear()
    activation = Activation([LoadRequest("a"), LoadRequest("b")])
    before = activation.state

    task = asyncio.ensure_future(activation.run(node))
    await until(lambda: activation.state.in_progress is not None)
    during = activation.state
    node.load_may_end.set()
    await task

    assert (before.state, before.pending) == ("pre_warming", ["a", "b"])
    assert (during.state, during.in_progress, during.pending) == ("pre_warming", "a", ["b"])
    assert (activation.state.state, activation.state.completed) == ("ready", ["a", "b"])


async def test_a_model_that_cannot_be_loaded_does_not_keep_the_others() -> None:
    node = FakeNode()
    node.refusal = Unloadable("no such file", kind="path_not_found")
    activation = Activation([LoadRequest("a"), LoadRequest("b")])

    await activation.run(node)

    assert activation.state.state == "ready"
    assert [failure.model_id for failure in activation.state.failed] == ["a", "b"]
    assert activation.state.failed[0].error == "no such file"


def test_nothing_to_load_is_ready_at_once() -> None:
    assert Activation([]).state.state == "ready"


def test_before_a_device_process_spoke_the_installed_torch_is_named() -> None:
    build = Build.read()

    assert build.version(None).torch_version == build.torch_version
    assert build.package_version != "unknown"


def pair(node: FakeNode) -> list[FakeDevice]:
    return [*node.devices, FakeDevice(DeviceSpec(1, "cpu:1", 1024 * MIB, 2))]


def test_a_model_on_several_devices_shows_what_it_holds_on_each() -> None:
    node = FakeNode()
    held = [Footprint(3 * MIB, 2 * MIB, MIB), Footprint(5 * MIB, 2 * MIB, MIB)]
    node.models["m"] = FakeModel(LoadRequest("m"), pair(node), footprints=held)

    info = model_info(node.models["m"])

    assert [(device.index, device.weights_mb) for device in info.devices] == [(0, 3), (1, 5)]
    assert capabilities(node.models["m"]).size_bytes == 8 * MIB


def test_a_model_that_is_not_loaded_yet_shows_where_it_will_be() -> None:
    node = FakeNode()
    node.models["m"] = FakeModel(LoadRequest("m"), pair(node), "loading", footprints=[])

    info = model_info(node.models["m"])

    assert [(device.index, device.kv_mb) for device in info.devices] == [(0, 0), (1, 0)]


def test_a_refused_load_is_shown_with_its_kind_and_numbers() -> None:
    node, refusal = FakeNode(), Refusal("insufficient_memory", {"weights_bytes": 5})
    node.models["m"] = FakeModel(
        LoadRequest("m"), node.devices[:1], "failed", failure="no room", refusal=refusal
    )

    assert model_info(node.models["m"]).refusal == refusal
