"""``neuron check``: the arithmetic of a load, for people and programs, without a neuron."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.runtime import check as module
from cortex.runtime import cli
from cortex.runtime import config as config_module
from cortex.runtime.check import Answer, Room, rooms_of
from cortex.runtime.config import DeviceSpec
from cortex.runtime.discovery import Gpu, Inventory, ProbeFailed, Reading
from cortex.runtime.estimates import workspace_bytes
from cortex.runtime.model_files import Survey
from fake_hub import FakeHub
from supervisor_fakes import MIB
from tiny_repo import CONFIG, REPO, dense, described, gguf, safetensors

LARGE = 2**33


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    repo = dense() | {"tiny.F32.gguf": gguf(), "odd.Q2_K.gguf": gguf("mamba")}
    async with FakeHub({REPO: repo}) as fake:
        yield fake


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_module, "DEFAULT_PATH", tmp_path / "none.toml")
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NEURON_CACHE__DIRECTORY", str(tmp_path / "packages"))
    monkeypatch.setenv("COLUMNS", "120")


async def checked(
    hub: FakeHub,
    *arguments: str,
    memory_mb: int = 1024,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Result:
    """Return what the command says on a host with one small CPU device."""
    set_here = {
        "HF_ENDPOINT": hub.url,
        "NEURON_DEVICES__0__NAME": "cpu:0",
        "NEURON_DEVICES__0__MEMORY_MB": str(memory_mb),
        **environment,
    }
    return await asyncio.to_thread(
        lambda: CliRunner().invoke(cli.app, ["check", *arguments], env=set_here)
    )


async def answered(hub: FakeHub, *arguments: str, **how: Any) -> dict[str, Any]:
    result = await checked(hub, *arguments, "--json", **how)
    answer: dict[str, Any] = json.loads(result.output)
    assert result.exit_code == (0 if answer["loadable"] else 1)
    return answer


async def test_a_hubs_model_is_judged_by_its_headers(hub: FakeHub) -> None:
    answer = await answered(hub, REPO)

    [device] = answer["devices"]
    assert answer["loadable"] is True
    assert answer["origin"] == f"{hub.url}/{REPO} at aaaaaaaaaaaa"
    assert answer["download_bytes"] == sum(map(len, dense().values())) - len(dense()["README.md"])
    assert answer["quants"] == ["F32", "Q2_K"]
    assert answer["context_tokens"] == 1024
    assert device["weights_bytes"] == 2 * 16 * 640 + 4 * 16  # norms are float32
    assert device["kv_bytes_per_token"] == 2 * 8 * 4
    assert device["kv_bytes"] == 1024 * 64
    assert (device["total_bytes"], device["words"]) == (1024 * MIB, "fits")
    assert all(one.range for one in hub.received if "/resolve/" in one.path)


async def test_people_get_a_table(hub: FakeHub) -> None:
    result = await checked(hub, REPO, "--quant", "f32", "--max-context-tokens", "512")

    assert result.exit_code == 0
    words = " ".join(result.output.replace("│", " ").split())
    assert "architecture llama" in words
    assert "GGUF, mostly F32" in words
    assert "quants there F32, Q2_K" in words
    assert "context 512 tokens" in words
    assert "cpu:0 1024 1024 1 " in words


async def test_what_is_here_needs_no_download(hub: FakeHub, embedded_model: Path) -> None:
    answer = await answered(hub, f"file:{embedded_model}")

    assert (answer["cached"], answer["download_bytes"], answer["quant"]) == (True, 0, "Q4_1")
    assert "none: all of it is here" in (await checked(hub, f"file:{embedded_model}")).output


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([REPO, "--quant", "Q4_K_M"], "quant_not_found"),
        ([REPO, "--quant", "Q2_K"], "architecture_unsupported"),
        ([REPO, "--max-context-tokens", "5000"], "context_too_long"),
        (["acme/gone"], "repo_not_found"),
        (["nonsense"], "source_unsupported"),
        (["file:/nowhere"], "path_not_found"),
    ],
)
async def test_what_cannot_be_loaded_is_said_with_its_kind(
    hub: FakeHub, arguments: list[str], kind: str
) -> None:
    answer = await answered(hub, *arguments)
    result = await checked(hub, *arguments)

    assert (answer["loadable"], answer["refusal"]["kind"]) == (False, kind)
    assert result.exit_code == 1
    assert "not loadable: " in result.output


@pytest.mark.parametrize(
    "arguments",
    [[], [REPO, "--max-context-tokens", "5"], [REPO, "--devices", "tpu"], [REPO, "--config", "/x"]],
)
async def test_a_question_that_is_wrong_is_exit_2(hub: FakeHub, arguments: list[str]) -> None:
    assert (await checked(hub, *arguments)).exit_code == 2


async def test_a_package_that_was_never_fetched_is_judged_by_what_is_known(hub: FakeHub) -> None:
    small = await answered(hub, "smollm2-135m-instruct", memory_mb=64)
    unknown = await answered(hub, "pypi:some-package/some.gguf")

    assert (small["loadable"], small["devices"][0]["words"]) == (False, "too small: needs 94 MB")
    assert unknown["devices"][0]["words"] == "nobody knows its size before it is downloaded"
    assert "does not say" in (await checked(hub, "pypi:some-package/some.gguf")).output


# devices


def verdict(tmp_path: Path, free_mb: int, total_mb: int, name: str = "cpu:0") -> dict[str, Any]:
    """Return how a device is judged for a model of 20 MB of cache in its context."""
    config = {**CONFIG, "num_hidden_layers": 128, "max_position_embeddings": 2560}
    for path, data in described().items():
        (tmp_path / path).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(safetensors({"w": [MIB // 2, 4]}))
    survey = Survey("here", tmp_path, 4 * MIB, 4 * MIB, Checkpoint.open(tmp_path))
    room = Room(DeviceSpec(0, name, total_mb * MIB), free_mb * MIB)
    answer = module.judge(LoadRequest("file:/x"), survey, [room])
    found: dict[str, Any] = msgspec.to_builtins(answer.devices[0])
    return found


@pytest.mark.parametrize(
    ("free_mb", "total_mb", "words"),
    [
        (30, 30, "fits"),
        (16, 30, "fits, with 1427 of 2560 tokens"),
        (8, 30, "would fit if it were empty: needs 9 MB"),
        (8, 8, "too small: needs 9 MB"),
    ],
)
def test_a_device_is_judged_by_what_is_free_of_it(
    tmp_path: Path, free_mb: int, total_mb: int, words: str
) -> None:
    found = verdict(tmp_path, free_mb, total_mb)

    assert found["words"] == words
    assert found.get("fits", False) is words.startswith("fits")


def test_a_gpu_keeps_a_narrower_cache_than_a_cpu(tmp_path: Path) -> None:
    on_cpu = verdict(tmp_path, 30, 30)
    on_gpu = verdict(tmp_path, 30, 30, "cuda:0")

    assert on_cpu["kv_bytes_per_token"] == 2 * on_gpu["kv_bytes_per_token"]


def test_the_estimate_of_the_workspace_is_near_what_was_measured() -> None:
    smollm = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    measured = 3_276_800 + 49_152 * (64 * 8 + 8 * 96)

    assert workspace_bytes(smollm, "cpu", 4) == pytest.approx(measured, rel=0.05)


class Probe:
    """A driver that says *free_bytes*, or nothing."""

    def __init__(self, free_bytes: int | None) -> None:
        self._free_bytes = free_bytes

    def inventory(self) -> Inventory:
        return Inventory((Gpu(0, "GPU", "GPU-1", LARGE),))

    def read(self, gpu: Gpu) -> Reading:
        assert gpu.index == 0
        if self._free_bytes == 0:
            raise ProbeFailed("gone")
        return Reading(free_bytes=self._free_bytes)


@pytest.mark.parametrize(
    ("said", "free_bytes"), [(5 * MIB, 5 * MIB), (2 * LARGE, LARGE), (None, LARGE), (0, LARGE)]
)
def test_a_gpus_driver_says_what_is_free(said: int | None, free_bytes: int) -> None:
    probe = Probe(said)
    specs = [DeviceSpec(0, "cuda:0", LARGE), DeviceSpec(1, "cpu:0", MIB)]

    gpu, cpu = rooms_of(specs, probe.inventory(), probe)

    assert (gpu.free_bytes, gpu.spec.kind) == (free_bytes, "cuda")
    assert (cpu.free_bytes, cpu.spec.kind) == (MIB, "cpu")


async def test_a_model_for_several_devices_has_a_row_for_each_rank(hub: FakeHub) -> None:
    more = {"NEURON_DEVICES__1__NAME": "cpu:1", "NEURON_DEVICES__1__MEMORY_MB": "512"}

    answer = await answered(hub, REPO, "--tensor-parallel", "2", environment=more)
    result = await checked(hub, REPO, "--devices", "1,0", environment=more)

    ranks = [(device["rank"], device["device"]) for device in answer["devices"]]
    assert ranks == [(0, "cpu:0"), (1, "cpu:1")]
    assert {device["weights_bytes"] for device in answer["devices"]} == {2 * 16 * 320 + 4 * 16}
    assert {device["kv_bytes_per_token"] for device in answer["devices"]} == {2 * 8 * 4}
    words = " ".join(result.output.replace("│", " ").split())
    assert "shared by 2 devices" in words
    assert "0 cpu:0 1024 1024 1 " in words
    assert "1 cpu:1 512 512 1 " in words


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--tensor-parallel", "2"], "too_few_devices"),
        (["--devices", "7"], "no_such_device"),
        (["--devices", "0,0"], "devices_mismatch"),
    ],
)
async def test_devices_that_are_not_there_are_said(
    hub: FakeHub, arguments: list[str], kind: str
) -> None:
    answer = await answered(hub, REPO, *arguments)

    assert (answer["loadable"], answer["refusal"]["kind"]) == (False, kind)


async def test_ranks_are_loadable_only_where_all_of_them_fit(hub: FakeHub) -> None:
    rooms = [Room(DeviceSpec(n, f"cpu:{n}", LARGE), free) for n, free in enumerate((LARGE, 1))]
    survey = Survey("o", None, size_bytes=9 * MIB)

    shared = module.judge(LoadRequest("m", tensor_parallel=2), survey, rooms)
    alone = module.judge(LoadRequest("m"), survey, rooms)

    assert (shared.loadable, alone.loadable) == (False, True)
    assert [verdict.weights_bytes for verdict in shared.devices] == [9 * MIB // 2] * 2


async def test_dense_weights_that_would_be_quantised_are_judged_as_that(hub: FakeHub) -> None:
    answer = await answered(hub, REPO, "--quant", "q8_0")
    result = await checked(hub, REPO, "--quant", "q8_0")

    assert (answer["becomes"], answer.get("quant")) == ("q8_0", None)
    assert "dense, quantised to q8_0 while loading" in " ".join(result.output.split())


@pytest.mark.parametrize(("capability", "is_slow"), [("7.5", True), ("8.0", False), (None, False)])
def test_an_old_gpu_is_said_to_be_slow_in_bfloat16(
    tmp_path: Path, capability: str | None, is_slow: bool
) -> None:
    for name, content in dense().items():
        (tmp_path / name).write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path)
    room = Room(DeviceSpec(0, "cuda:0", LARGE), LARGE, capability)

    answer = module.judge(LoadRequest("m"), Survey("o", tmp_path, checkpoint=checkpoint), [room])
    in_float16 = module.judge(
        LoadRequest("m", dtype="float16"), Survey("o", tmp_path, checkpoint=checkpoint), [room]
    )

    assert ("bfloat16, which is slow" in answer.devices[0].words) is is_slow
    assert in_float16.devices[0].words == "fits"


def test_a_half_fetched_model_says_how_much_is_here() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    answer = Answer("m", loadable=True, origin="o", size_bytes=9 * MIB, download_bytes=4 * MIB)

    module.show(console, answer)

    assert "4 MB, 5 MB of it are here" in console.export_text()
