"""What a load would take is told without loading, or refused where no eviction would help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cortex.ipc.downloads import HubAccess
from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import EMBEDDED_MODEL, LoadEstimate, LoadRequest
from cortex.runtime import model_loads
from cortex.runtime.config import DeviceSpec
from cortex.runtime.estimates import Estimate, estimate_of, workspace_bytes
from cortex.runtime.hub import HubSettings
from cortex.runtime.model_files import ModelFiles
from cortex.runtime.places import Places
from cortex.runtime.preflight import opened
from fake_node import FakeNode, serving
from supervisor_bench import A, Neuron
from supervisor_fakes import FOOTPRINT, MIB
from tiny_text import TINY_LLAMA, metadata_of, trained, write_gguf

CPU = DeviceSpec(0, "cpu:0", 1024 * MIB, 1)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A GGUF file of the llama architecture in F32."""
    metadata = TINY_LLAMA | metadata_of(trained("smollm"), "smollm")
    return write_gguf(tmp_path / "tiny.gguf", metadata)


def estimated(path: Path, measured: Footprint | None = None, **fields: Any) -> Estimate:
    return estimate_of(opened(path), LoadRequest(f"file:{path}", **fields), CPU, measured)


# the arithmetic


def test_it_is_weights_cache_and_workspace(tiny: Path) -> None:
    checkpoint = opened(tiny)
    step = workspace_bytes(checkpoint.config, "cpu", 4)

    least = estimated(tiny, max_context_tokens=16).least_bytes
    more = estimated(tiny, max_context_tokens=116).least_bytes

    per_token = (more - least) // 100
    assert per_token > 0
    assert least == checkpoint.weights_bytes + step + 16 * per_token


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_context_tokens": 600}, 600 + 31 * 512),
        ({"max_context_tokens": 100}, 100 + 31 * 100),
        ({"max_context_tokens": 600, "max_sequences": 4}, 4 * 600),
        ({"max_sequences": 4}, 1024 + 3 * 512),
    ],
)
def test_what_is_wanted_is_what_the_device_would_make_of_it(
    tiny: Path, fields: dict[str, Any], tokens: int
) -> None:
    at_least = estimated(tiny, max_context_tokens=16).least_bytes
    per_token = (estimated(tiny, max_context_tokens=17).least_bytes - at_least) or 1

    assert estimated(tiny, **fields).wanted_bytes == at_least + (tokens - 16) * per_token


def test_a_cache_of_so_many_megabytes_is_just_that(tiny: Path) -> None:
    found = estimated(tiny, kv_cache_mb=7)

    assert found.least_bytes == found.wanted_bytes
    assert found.wanted_bytes - estimated(tiny, kv_cache_mb=5).wanted_bytes == 2 * MIB


def test_what_was_measured_counts_instead_of_arithmetic(tiny: Path) -> None:
    found = estimated(tiny, measured=Footprint(100 * MIB, MIB, 30 * MIB), kv_cache_mb=7)

    assert found.wanted_bytes == (100 + 30 + 7) * MIB


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"kv_cache_mb": 2048}, "insufficient_memory"), ({"quant": "Q4_0"}, "quant_not_found")],
)
def test_what_no_eviction_would_help_is_refused(
    tiny: Path, fields: dict[str, Any], kind: str
) -> None:
    with pytest.raises(Unloadable) as refused:
        estimated(tiny, **fields)

    assert refused.value.kind == kind
    if kind == "insufficient_memory":
        assert refused.value.extras["memory_bytes"] == CPU.memory_bytes
        assert {"weights_bytes", "kv_bytes"} <= set(refused.value.extras)


def test_a_rank_has_all_logits_and_its_share_of_the_rest(tiny: Path) -> None:
    alone, shared = (estimated(tiny, tensor_parallel=ranks) for ranks in (1, 2))
    config = opened(tiny).config

    workspaces = [workspace_bytes(config, "cpu", 4, ranks) for ranks in (1, 2)]

    saved = workspaces[0] - workspaces[1]
    assert saved == 128 * 3 * (config["intermediate_size"] // 2) * 4
    assert alone.least_bytes // 2 < shared.least_bytes < alone.least_bytes - saved


# of files


async def test_a_model_that_is_not_here_is_judged_by_its_size_alone(tmp_path: Path) -> None:
    hub = HubSettings(HubAccess("http://127.0.0.1:1"), tmp_path / "hub")
    files = ModelFiles(Places(tmp_path / "cache", None, hub))
    small = DeviceSpec(0, "cpu:0", 50 * MIB, 1)
    try:
        assert await files.estimate(LoadRequest(EMBEDDED_MODEL), CPU) is None
        with pytest.raises(Unloadable) as refused:
            await files.estimate(LoadRequest(EMBEDDED_MODEL), small)
    finally:
        files.close()
    assert refused.value.kind == "insufficient_memory"


async def test_a_model_that_is_here_is_estimated_by_its_headers(tiny: Path) -> None:
    hub = HubSettings(HubAccess("http://127.0.0.1:1"), tiny.parent / "hub")
    files = ModelFiles(Places(tiny.parent / "cache", None, hub))
    try:
        found = await files.estimate(LoadRequest(f"file:{tiny}"), CPU)
    finally:
        files.close()
    assert found == estimated(tiny)


# of a neuron


@pytest.fixture
async def neuron() -> AsyncIterator[Neuron]:
    neuron = Neuron()
    async with neuron.supervisor:
        for device in neuron.supervisor.devices:
            await device.become_ready()
        yield neuron


async def test_numbers_are_in_whole_megabytes_rounded_up(neuron: Neuron) -> None:
    neuron.files.estimate_is = Estimate(3 * MIB + 1, 9 * MIB)

    assert await neuron.supervisor.estimate(LoadRequest(A)) == LoadEstimate(4, 9)
    assert neuron.supervisor.models == {}


async def test_what_devices_share_is_estimated_for_all_of_them_together(neuron: Neuron) -> None:
    neuron.files.estimate_is = Estimate(3 * MIB + 1, 9 * MIB)

    found = await neuron.supervisor.estimate(LoadRequest(A, tensor_parallel=2))

    assert found == LoadEstimate(8, 18)


async def test_an_earlier_load_is_told_of(neuron: Neuron) -> None:
    await neuron.loads(A, device=None)
    neuron.files.estimate_is = Estimate(MIB, 2 * MIB)

    found = await neuron.supervisor.estimate(LoadRequest(A))

    assert found == LoadEstimate(1, 2, is_measured=True)
    assert neuron.files.measured[-1] == FOOTPRINT


async def test_what_only_a_download_tells_is_absent(neuron: Neuron) -> None:
    assert await neuron.supervisor.estimate(LoadRequest(A)) == LoadEstimate()


async def test_a_hub_that_takes_its_time_is_not_waited_for(
    neuron: Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_loads, "EXAMINE_SECONDS", 0.0)
    neuron.files.may_examine.clear()
    before = await neuron.supervisor.estimate(LoadRequest(A))
    neuron.files.may_examine.set()
    monkeypatch.undo()
    await neuron.loads(A, device=None)
    monkeypatch.setattr(model_loads, "EXAMINE_SECONDS", 0.0)
    neuron.files.may_examine.clear()

    after = await neuron.supervisor.estimate(LoadRequest(A))

    held = -(-FOOTPRINT.total_bytes // MIB)
    assert (before, after) == (LoadEstimate(), LoadEstimate(held, held, is_measured=True))


async def test_what_cannot_work_is_refused_as_the_load_would_be(neuron: Neuron) -> None:
    neuron.files.verdict = Unloadable("too large", kind="insufficient_memory")

    with pytest.raises(Unloadable, match="too large"):
        await neuron.supervisor.estimate(LoadRequest(A))
    with pytest.raises(Unloadable) as refused:
        await neuron.supervisor.estimate(LoadRequest(A, devices=[5]))
    assert refused.value.kind == "no_such_device"


async def test_it_is_judged_by_the_device_asked_for_or_the_largest(neuron: Neuron) -> None:
    large = neuron.supervisor.devices[1]
    large.spec = DeviceSpec(1, "cpu:1", 4096 * MIB, 1)

    await neuron.supervisor.estimate(LoadRequest(A))
    await neuron.supervisor.estimate(LoadRequest(A, devices=[0]))

    assert neuron.files.estimated_for == [(A, 1), (A, 0)]


async def test_devices_that_were_given_up_are_no_devices(neuron: Neuron) -> None:
    async with asyncio.timeout(20):
        await neuron.dies(device=0, times=4)
        await neuron.dies(device=1, times=4)

    with pytest.raises(Unloadable) as refused:
        await neuron.supervisor.estimate(LoadRequest(A))
    assert refused.value.kind == "device_poisoned"


# over HTTP


async def test_an_estimate_leaves_out_what_nobody_knows() -> None:
    node = FakeNode()
    async with serving(node) as client:
        said = []
        for estimate in (LoadEstimate(), LoadEstimate(4, 9, is_measured=True)):
            node.load_estimate = estimate
            async with client.post("/models/estimate", json={"model_id": A}) as response:
                said.append((response.status, await response.json()))

    assert said == [(200, {}), (200, {"least_mb": 4, "wanted_mb": 9, "is_measured": True})]
    assert node.acts[0] == ("estimate", LoadRequest(A))


async def test_what_cannot_work_is_422_with_its_numbers() -> None:
    node = FakeNode()
    node.refusal = Unloadable("too large", kind="insufficient_memory", weights_bytes=5)

    async with (
        serving(node) as client,
        client.post("/models/estimate", json={"model_id": A}) as response,
    ):
        body = await response.json()

    assert response.status == 422
    assert (body["error"]["kind"], body["error"]["weights_bytes"]) == ("insufficient_memory", 5)
