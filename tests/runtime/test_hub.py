"""A model of a hub: looked at before it is fetched, fetched by a child, found again offline."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cortex.ipc.downloads import DownloadJob, HubAccess, RepoFile
from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.runtime import hub as module
from cortex.runtime.hub import Hub, HubSettings, run_download
from cortex.runtime.hub_cache import default_hub_cache, find, find_any, hub_home
from cortex.runtime.hub_client import Patience
from cortex.runtime.hub_files import HubSource
from cortex.runtime.hub_headers import RemoteModel
from fake_hub import COMMIT, FakeHub
from fakes import until
from tiny_repo import CONFIG, INDEX, REPO, dense, gguf, safetensors, sharded

SOURCE = HubSource(REPO)
NEXT = "b" * 40


@pytest.fixture(autouse=True)
def _without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASKING", Patience(attempts=2, first_seconds=0.0))


@pytest.fixture
async def fake() -> AsyncIterator[FakeHub]:
    async with FakeHub({REPO: dense()}) as fake:
        yield fake


@pytest.fixture
def settings(fake: FakeHub, tmp_path: Path) -> HubSettings:
    return HubSettings(HubAccess(fake.url), tmp_path / "hub")


@pytest.fixture
def hub(settings: HubSettings) -> Hub:
    return Hub(settings)


async def looked(hub: Hub, quant: str | None = None, source: HubSource = SOURCE) -> RemoteModel:
    model = await hub.look(source, quant)
    assert model is not None
    return model


async def fetched(hub: Hub, quant: str | None = None, source: HubSource = SOURCE) -> Path:
    return await hub.fetch(await looked(hub, quant, source), lambda *_: None)


def offline(settings: HubSettings) -> Hub:
    return Hub(HubSettings(settings.access, settings.cache, is_offline=True))


# looking


async def test_a_dense_model_is_its_weights_and_what_describes_them(hub: Hub) -> None:
    model = await looked(hub)

    assert {file.path for file in model.files} == set(dense()) - {"README.md"}


async def test_the_shards_are_those_of_the_index(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] = sharded(3) | {"consolidated.safetensors": b"the same once more"}

    model = await looked(hub)

    assert {file.path for file in model.files} == set(sharded(3)) - {"README.md"}
    assert model.files[-1].path == INDEX


async def test_an_index_that_is_no_json_is_refused(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] = sharded() | {INDEX: b"{"}

    with pytest.raises(Unloadable) as refused:
        await hub.look(SOURCE, None)

    assert refused.value.kind == "corrupt_checkpoint"


async def test_a_quant_is_one_file(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] |= {"tiny.F32.gguf": gguf(), "tiny.Q4_0.gguf": b"other"}

    assert [file.path for file in (await looked(hub, "f32")).files] == ["tiny.F32.gguf"]


# headers


async def test_headers_say_what_the_checkpoint_is_without_its_weights(
    fake: FakeHub, hub: Hub
) -> None:
    weights = safetensors({"model.embed_tokens.weight": [640, 1024]})
    fake.repos[REPO] = dense(**{"model.safetensors": weights})

    checkpoint = await hub.examine(await looked(hub))

    assert checkpoint.weights_bytes == 640 * 1024 * 2
    assert checkpoint.config == CONFIG
    [asked] = fake.contents("model.safetensors")
    assert asked.range == "bytes=0-262143"


async def test_a_header_longer_than_its_first_part_is_read_to_its_end(
    fake: FakeHub, hub: Hub
) -> None:
    weights = safetensors({"w": [64]}, padding=400_000)
    fake.repos[REPO] = dense(**{"model.safetensors": weights})

    assert set((await hub.examine(await looked(hub))).tensors) == {"w"}
    assert len(fake.contents("model.safetensors")) == 2


async def test_headers_of_shards_count_together(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] = sharded(3)

    assert (await hub.examine(await looked(hub))).weights_bytes == 3 * 64 * 16 * 2


async def test_a_gguf_is_read_until_its_header_is_whole(
    fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.runtime.hub_headers.GGUF_BYTES", 1000)
    whole = gguf()
    fake.repos[REPO] = {"tiny.F32.gguf": whole}

    checkpoint = await hub.examine(await looked(hub, "F32"))

    first = min(tensor.offset for tensor in checkpoint.tensors.values())
    ranges = [(one.range or "").removeprefix("bytes=") for one in fake.contents("tiny.F32.gguf")]
    assert ranges[:2] == ["0-999", "1000-3999"]
    assert int(ranges[-1].split("-")[0]) < first


async def test_a_damaged_header_names_the_repository_and_no_temporary_file(
    fake: FakeHub, hub: Hub
) -> None:
    fake.repos[REPO] = {"tiny.F32.gguf": b"GGML" + bytes(5000)}

    with pytest.raises(Unloadable, match=r"^acme/tiny: tiny.F32.gguf: not a GGUF") as refused:
        await hub.examine(await looked(hub, "F32"))

    assert refused.value.kind == "corrupt_checkpoint"


async def test_a_shard_whose_header_is_too_long_for_it_is_refused(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] = dense(**{"model.safetensors": (2**40).to_bytes(8, "little") + b"{}"})

    with pytest.raises(Unloadable, match="claims a header") as refused:
        await hub.examine(await looked(hub))

    assert refused.value.kind == "corrupt_checkpoint"


async def test_a_header_that_there_is_no_room_for_is_refused_in_words(
    fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.runtime.hub_headers.GGUF_BYTES", 1000)
    fake.repos[REPO] = {"tiny.F32.gguf": gguf()}
    manner = fake.manners["tiny.F32.gguf"]
    manner.stated_size, manner.content_range = 2**62, f"bytes 0-999/{2**62}"

    with pytest.raises(Unloadable, match="could not be written") as refused:
        await hub.examine(await looked(hub, "F32"))

    assert refused.value.kind == "fetch_failed"


async def test_a_header_that_cannot_be_had_is_the_refusal(fake: FakeHub, hub: Hub) -> None:
    model = await looked(hub)
    fake.is_gated = True

    with pytest.raises(Unloadable) as refused:
        await hub.examine(model)

    assert refused.value.kind == "gated"


async def test_headers_that_were_read_are_kept_a_while(fake: FakeHub, hub: Hub) -> None:
    model = await looked(hub)
    first = await hub.examine(model)
    fake.received.clear()

    assert await hub.examine(model) is first
    assert fake.received == []

    for number in range(module.KEPT_HEADERS):
        fake.commit = f"{number}" * 40
        await hub.examine(RemoteModel(SOURCE, fake.commit, model.files))
    fake.commit = COMMIT
    assert await hub.examine(model) is not first


# fetching


async def test_a_model_is_fetched_and_can_be_opened(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] = sharded()
    heard: list[tuple[int, int]] = []
    model = await looked(hub)

    path = await hub.fetch(model, lambda done, total: heard.append((done, total)))

    assert Checkpoint.open(path).weights_bytes == 2 * 64 * 16 * 2
    assert fake.contents("README.md") == []
    assert {total for _, total in heard} == {model.size_bytes}
    assert heard[-1][0] == model.size_bytes


async def test_a_gguf_is_fetched_and_opened_by_its_name(fake: FakeHub, hub: Hub) -> None:
    fake.repos[REPO] = {"sub/tiny.F32.gguf": gguf()}

    path = await fetched(hub, "F32")

    assert path.name == "tiny.F32.gguf"
    assert Checkpoint.open(path).quant == "F32"


async def test_a_model_that_is_here_is_not_fetched_again(fake: FakeHub, hub: Hub) -> None:
    first = await fetched(hub)
    fake.received.clear()

    assert await fetched(hub) == first
    assert fake.contents("model.safetensors") == []


async def test_a_model_that_is_here_loads_from_a_cache_that_is_only_read(
    settings: HubSettings, hub: Hub
) -> None:
    first = await fetched(hub)
    refs = settings.cache / "models--acme--tiny" / "refs"
    (refs / "main").unlink()
    refs.rmdir()
    refs.write_bytes(b"")  # where nothing can be written, also by root

    assert await fetched(hub) == first


async def test_a_branch_that_has_moved_is_fetched_anew(fake: FakeHub, hub: Hub) -> None:
    old = await fetched(hub)
    fake.commit = NEXT
    fake.received.clear()

    new = await fetched(hub)

    assert (old.name, new.name) == (COMMIT, NEXT)
    assert fake.contents("model.safetensors") == []  # its content is the same, so it is linked
    assert hub.find(SOURCE, None) == new


async def test_a_full_disk_is_refused_before_the_first_byte(
    fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await looked(hub)
    fake.received.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(Unloadable, match=r"needed .* MB, free 0 MB") as refused:
        await hub.fetch(model, lambda *_: None)

    assert refused.value.kind == "disk_full"
    assert refused.value.extras["needed_bytes"] == model.size_bytes
    assert fake.received == []


async def test_what_is_half_here_needs_only_room_for_the_rest(
    hub: Hub, settings: HubSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await looked(hub)
    weights = next(file for file in model.files if file.path == "model.safetensors")
    part = settings.cache / "models--acme--tiny" / "blobs" / f"{weights.blob}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(dense()["model.safetensors"][:5000])
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=model.size_bytes - 5000)
    )

    assert hub.bytes_here(model) == 5000
    assert (await hub.fetch(model, lambda *_: None)).is_dir()


async def test_a_cache_that_cannot_be_made_is_said_in_words(
    settings: HubSettings, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    hub = Hub(HubSettings(settings.access, tmp_path / "file" / "hub"))

    with pytest.raises(Unloadable, match="could not be written") as refused:
        await hub.fetch(await looked(hub), lambda *_: None)

    assert refused.value.kind == "fetch_failed"


async def test_a_lie_about_a_checksum_reaches_the_caller(fake: FakeHub, hub: Hub) -> None:
    fake.manners["model.safetensors"].stated_sha256 = "5" * 64

    with pytest.raises(Unloadable) as refused:
        await fetched(hub)

    assert refused.value.kind == "checksum_mismatch"
    assert refused.value.extras["expected"] == "5" * 64


async def test_cancelling_ends_the_child_at_once_and_keeps_what_came(
    fake: FakeHub, hub: Hub, settings: HubSettings
) -> None:
    weights = dense()["model.safetensors"]
    fake.manners["model.safetensors"].stops = [9000]
    model = await looked(hub)
    part = f"{hashlib.sha256(weights).hexdigest()}.incomplete"
    before = children()

    fetching = asyncio.ensure_future(hub.fetch(model, lambda *_: None))
    await until(lambda: sizes(settings.cache).get(part) == 9000)
    assert children() != before
    fetching.cancel()
    with suppress(asyncio.CancelledError):
        await fetching

    assert children() == before
    assert hub.find(SOURCE, None) is None
    fake.received.clear()
    assert (await fetched(hub)).is_dir()
    assert [one.range for one in fake.contents("model.safetensors")] == [
        f"bytes=9000-{len(weights) - 1}"
    ]


async def test_a_download_dies_with_its_neuron_and_goes_on_in_the_next(
    fake: FakeHub, hub: Hub, settings: HubSettings
) -> None:
    fake.manners["model.safetensors"].stops = [9000]
    job = job_of(settings, await looked(hub))
    neuron = await asyncio.create_subprocess_exec(sys.executable, "-c", NEURON, job)
    part = f"{hashlib.sha256(dense()['model.safetensors']).hexdigest()}.incomplete"
    await until(lambda: sizes(settings.cache).get(part) == 9000, within_seconds=30)
    grandchildren = children(neuron.pid)
    neuron.kill()
    await neuron.wait()

    await until(lambda: not any(map(is_alive, grandchildren)))
    assert len(grandchildren) == 1
    fake.received.clear()
    assert (await fetched(hub)).is_dir()
    assert (fake.contents("model.safetensors")[0].range or "").startswith("bytes=9000-")


async def test_two_neurons_download_it_once(fake: FakeHub, settings: HubSettings) -> None:
    one, other = Hub(settings), Hub(settings)
    models = [await looked(one), await looked(other)]
    fake.received.clear()

    paths = await asyncio.gather(
        one.fetch(models[0], lambda *_: None), other.fetch(models[1], lambda *_: None)
    )

    assert paths[0] == paths[1]
    assert len(fake.contents("model.safetensors")) == 1


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('it broke')", "ended with exit status 1: it broke"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal 9"),
        ("", "ended with exit status 0"),
    ],
)
async def test_a_child_that_ends_without_a_word_is_a_refusal(
    settings: HubSettings, program: str, words: str
) -> None:
    files = [RepoFile("x" * 100, 1, "0" * 40)] * 10_000  # more than a pipe holds
    job = DownloadJob(settings.access, str(settings.cache), REPO, "main", COMMIT, files)

    with pytest.raises(Unloadable) as refused:
        await run_download(job, lambda _: None, [sys.executable, "-c", program])

    assert (refused.value.kind, words in str(refused.value)) == ("fetch_failed", True)


def test_a_child_without_its_parent_does_nothing() -> None:
    command = [sys.executable, "-m", "cortex.runtime.hub_download", "1"]

    assert subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode == 1


# the cache, and no network


async def test_offline_what_is_here_serves(fake: FakeHub, hub: Hub, settings: HubSettings) -> None:
    path = await fetched(hub)
    fake.received.clear()

    assert await offline(settings).look(SOURCE, None) is None
    assert offline(settings).find(SOURCE, None) == path
    assert fake.received == []


async def test_offline_what_is_not_here_is_refused_in_words(
    fake: FakeHub, settings: HubSettings
) -> None:
    with pytest.raises(Unloadable, match="this neuron is offline") as refused:
        await offline(settings).look(SOURCE, "Q4_0")

    assert refused.value.kind == "not_cached"
    assert "acme/tiny with quant Q4_0" in str(refused.value)
    assert fake.received == []


async def test_a_commit_that_is_here_needs_nobody(fake: FakeHub, hub: Hub) -> None:
    source = HubSource(REPO, COMMIT)
    await fetched(hub, source=source)
    fake.received.clear()

    assert await hub.look(source, None) is None
    assert fake.received == []


@pytest.mark.parametrize("failure", [503, 429, None])
async def test_what_is_here_serves_while_the_hub_is_gone(
    settings: HubSettings, fake: FakeHub, hub: Hub, failure: int | None
) -> None:
    await fetched(hub)
    if failure:
        fake.failures = [(failure, {})]
    else:
        hub = Hub(HubSettings(HubAccess("http://127.0.0.1:1"), settings.cache))

    assert await hub.look(SOURCE, None) is None


async def test_a_hub_that_refuses_is_not_taken_for_one_that_is_gone(
    fake: FakeHub, hub: Hub
) -> None:
    await fetched(hub)
    fake.is_gated = True

    with pytest.raises(Unloadable) as refused:
        await hub.look(SOURCE, None)

    assert refused.value.kind == "gated"


async def test_a_model_without_one_of_its_shards_is_not_here(
    fake: FakeHub, hub: Hub, settings: HubSettings
) -> None:
    fake.repos[REPO] = sharded()
    path = await fetched(hub)
    assert find(settings.cache, SOURCE, None) == path

    (path / "model-00002-of-00002.safetensors").unlink()
    assert find(settings.cache, SOURCE, None) is None

    (path / INDEX).unlink()
    (path / INDEX).write_text("{")
    assert find(settings.cache, SOURCE, None) is None


async def test_a_ref_that_is_no_commit_is_none(hub: Hub, settings: HubSettings) -> None:
    await fetched(hub)
    (settings.cache / "models--acme--tiny/refs/main").write_text("../../../etc")

    assert find(settings.cache, SOURCE, None) is None


async def test_anything_that_could_be_loaded_is_found(
    fake: FakeHub, hub: Hub, settings: HubSettings
) -> None:
    assert find_any(settings.cache, SOURCE) is None
    fake.repos[REPO] = {"tiny.F32.gguf": gguf()}
    path = await fetched(hub, "F32")

    assert find(settings.cache, SOURCE, None) is None
    assert find_any(settings.cache, SOURCE) == path


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ],
)
def test_the_cache_is_where_the_other_tools_have_it(
    environment: dict[str, str], expected: str
) -> None:
    assert default_hub_cache(environment) == Path(expected)
    assert hub_home({"HF_HOME": "~/x"}) == Path.home() / "x"


async def test_huggingfaces_own_tool_finds_what_we_fetched(hub: Hub, settings: HubSettings) -> None:
    path = await fetched(hub)

    said = await by_their_tool(
        f"snapshot_download({REPO!r}, cache_dir={str(settings.cache)!r}, local_files_only=True)"
    )

    assert said == str(path)


async def test_we_find_what_huggingfaces_own_tool_fetched(
    fake: FakeHub, settings: HubSettings
) -> None:
    said = await by_their_tool(
        f"snapshot_download({REPO!r}, cache_dir={str(settings.cache)!r}, endpoint={fake.url!r})"
    )

    assert find(settings.cache, SOURCE, None) == Path(said)
    fake.received.clear()
    assert await fetched(Hub(settings)) == Path(said)
    assert fake.contents("model.safetensors") == []


async def by_their_tool(call: str) -> str:
    """Return what *call* of huggingface_hub returns, in a process that talks with loopback only."""
    program = f"from huggingface_hub import snapshot_download; print({call})"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    said, _ = await process.communicate()
    return said.decode().strip()


NEURON = """
import asyncio, msgspec, sys
from cortex.ipc.downloads import DownloadJob
from cortex.runtime.hub import run_download
job = msgspec.json.decode(sys.argv[1], type=DownloadJob)
asyncio.run(run_download(job, lambda done: None))
"""


def job_of(settings: HubSettings, model: RemoteModel) -> str:
    return json.dumps(
        {
            "access": {"endpoint": settings.access.endpoint},
            "cache": str(settings.cache),
            "repo": REPO,
            "revision": "main",
            "commit": model.commit,
            "files": [
                {
                    "path": file.path,
                    "size_bytes": file.size_bytes,
                    "blob": file.blob,
                    "sha256": file.sha256,
                }
                for file in model.files
            ],
        }
    )


def sizes(cache: Path) -> dict[str, int]:
    """Return how much of each blob is there; one may get its last name while we look."""
    found = {}
    for path in cache.glob("models--acme--tiny/blobs/*"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_size
    return found


def children(pid: int | None = None) -> list[int]:
    """Return the processes that *pid*, or this one, has started and that live."""
    text = Path(f"/proc/{pid or os.getpid()}/task/{pid or os.getpid()}/children").read_text()
    return [int(word) for word in text.split() if is_alive(int(word))]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
