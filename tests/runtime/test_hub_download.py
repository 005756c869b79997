"""What a hub sends becomes files of the cache, whole and checked; what breaks is continued from."""

import asyncio
import errno
import hashlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cortex.ipc.downloads import AnyReport, Downloaded, DownloadFailed, DownloadJob, HubAccess
from cortex.ipc.errors import Unloadable
from cortex.runtime import hub_download as module
from cortex.runtime.file_lock import locked
from cortex.runtime.hub_cache import RepoCache
from cortex.runtime.hub_client import HubClient, Patience
from cortex.runtime.hub_download import download, failure_of
from cortex.runtime.hub_files import HubSource
from fake_hub import COMMIT, FakeHub
from fakes import until

REPO = "acme/tiny"
CONTENT = random.Random(5).randbytes(300_000)
FILES = {"config.json": b"{}", "a.safetensors": CONTENT, "b.safetensors": CONTENT[::-1]}
SHA256 = hashlib.sha256(CONTENT).hexdigest()
AT_ONCE = Patience(attempts=3, first_seconds=0.0)


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    async with FakeHub({REPO: FILES}) as fake:
        yield fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


async def job_of(hub: FakeHub, cache: Path, *names: str, parallel_files: int = 4) -> DownloadJob:
    """Return the job to bring *names*, or all files."""
    access = HubAccess(hub.url, None, parallel_files)
    async with HubClient(access, AT_ONCE) as asking:
        listing = await asking.listing(HubSource(REPO))
    files = [file for path, file in listing.files.items() if not names or path in names]
    hub.received.clear()
    return DownloadJob(access, str(cache), REPO, "main", COMMIT, files)


async def do(job: DownloadJob) -> list[int]:
    """Do *job* in this process, and return the bytes that it reported."""
    said: list[AnyReport] = []
    await download(job, said.append, HubClient(job.access, AT_ONCE))
    return [report.bytes_done for report in said if isinstance(report, Downloaded)]


async def refusal(job: DownloadJob) -> Unloadable:
    with pytest.raises(Unloadable) as refused:
        await do(job)
    return refused.value


def blobs(cache: Path) -> dict[str, bytes]:
    """Return what is among the blobs, by name."""
    return {path.name: path.read_bytes() for path in cache.glob("models--acme--tiny/blobs/*")}


async def test_files_lie_in_the_layout_that_other_tools_read(hub: FakeHub, cache: Path) -> None:
    await do(await job_of(hub, cache))

    repo = cache / "models--acme--tiny"
    snapshot = repo / "snapshots" / COMMIT
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == FILES
    assert (snapshot / "a.safetensors").readlink() == Path(f"../../blobs/{SHA256}")
    assert (repo / "refs" / "main").read_text() == COMMIT
    assert [name for name in blobs(cache) if name.endswith(".incomplete")] == []


async def test_only_what_is_asked_for_is_fetched_and_only_once(hub: FakeHub, cache: Path) -> None:
    await do(await job_of(hub, cache, "a.safetensors"))
    job = await job_of(hub, cache)
    await do(job)

    assert len(hub.contents("a.safetensors")) == 0
    assert len(hub.contents("b.safetensors")) == 1


async def test_progress_counts_all_files_and_never_shrinks(hub: FakeHub, cache: Path) -> None:
    heard = await do(await job_of(hub, cache))

    assert heard[0] == 0
    assert heard[-1] == sum(map(len, FILES.values()))
    assert sorted(set(heard)) == heard


async def test_files_in_folders_keep_their_folders(hub: FakeHub, cache: Path) -> None:
    hub.repos[REPO] = {"1_Pooling/config.json": b"{}"}

    await do(await job_of(hub, cache))

    link = cache / "models--acme--tiny/snapshots" / COMMIT / "1_Pooling/config.json"
    assert link.read_bytes() == b"{}"


async def test_two_names_of_one_content_are_fetched_once(hub: FakeHub, cache: Path) -> None:
    hub.repos[REPO] = {"a.safetensors": CONTENT, "b.safetensors": CONTENT}

    await do(await job_of(hub, cache))

    assert len(hub.received) == 1
    assert len(list((cache / "models--acme--tiny/snapshots" / COMMIT).iterdir())) == 2


async def test_an_empty_file_is_a_file(hub: FakeHub, cache: Path) -> None:
    hub.repos[REPO] = {"empty.txt": b""}

    await do(await job_of(hub, cache))

    assert (cache / "models--acme--tiny/snapshots" / COMMIT / "empty.txt").read_bytes() == b""


async def test_no_more_files_than_allowed_come_at_once(hub: FakeHub, cache: Path) -> None:
    for name in FILES:
        hub.manners[name].stops = [1]
    job = await job_of(hub, cache, parallel_files=2)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(do(job))
        while len(hub.received) < 2:
            await hub.is_silent.wait()
            await asyncio.sleep(0)
        at_once = len(hub.received)
        hub.may_go_on.set()

    assert at_once == 2
    assert len(hub.received) == 3


# going on from what is there


async def test_what_is_there_is_not_fetched_again(hub: FakeHub, cache: Path) -> None:
    job = await job_of(hub, cache, "a.safetensors")
    part = RepoCache(cache, REPO).partial(job.files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:200_000])

    heard = await do(job)

    assert heard[0] == 200_000
    assert [one.range for one in hub.received] == ["bytes=200000-299999"]
    assert blobs(cache) == {SHA256: CONTENT}


async def test_a_file_that_was_all_there_needs_no_request(hub: FakeHub, cache: Path) -> None:
    job = await job_of(hub, cache, "a.safetensors")
    part = RepoCache(cache, REPO).partial(job.files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)

    await do(job)

    assert hub.received == []
    assert blobs(cache) == {SHA256: CONTENT}


@pytest.mark.parametrize("left", [b"x" * 1000, bytes(300_000), bytes(400_000)])
async def test_bytes_that_somebody_else_left_are_not_trusted(
    hub: FakeHub, cache: Path, left: bytes
) -> None:
    job = await job_of(hub, cache, "a.safetensors")
    part = RepoCache(cache, REPO).partial(job.files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(left)

    heard = await do(job)

    assert blobs(cache) == {SHA256: CONTENT}
    assert sorted(heard) == heard


async def test_a_file_without_a_stated_checksum_is_not_gone_on_with(
    hub: FakeHub, cache: Path
) -> None:
    job = await job_of(hub, cache, "config.json")
    part = RepoCache(cache, REPO).partial(job.files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0\0")  # as long as it should be: what a power cut may leave

    await do(job)

    assert list(blobs(cache).values()) == [b"{}"]


async def test_a_link_where_a_file_should_grow_is_not_followed(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    job = await job_of(hub, cache, "a.safetensors")
    part = RepoCache(cache, REPO).partial(job.files[0])
    part.parent.mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.write_text("of worth")
    part.symlink_to(mine)

    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        await do(job)

    assert mine.read_text() == "of worth"


async def test_what_has_come_before_a_failure_is_kept(hub: FakeHub, cache: Path) -> None:
    job = await job_of(hub, cache, "a.safetensors")
    hub.manners["a.safetensors"].cuts = [10_000, 20_000, 30_000]

    assert (await refusal(job)).kind == "network_unreachable"

    assert blobs(cache) == {f"{SHA256}.incomplete": CONTENT[:60_000]}
    assert not (cache / "models--acme--tiny/refs/main").exists()


# lies


async def test_another_content_than_stated_is_refused_and_not_kept(
    hub: FakeHub, cache: Path
) -> None:
    hub.manners["a.safetensors"].stated_sha256 = "5" * 64

    refused = await refusal(await job_of(hub, cache, "a.safetensors"))

    assert refused.kind == "checksum_mismatch"
    assert (refused.extras["expected"], refused.extras["got"]) == ("5" * 64, SHA256)
    assert blobs(cache) == {}
    assert len(hub.received) == 1


async def test_a_continued_file_that_is_wrong_is_fetched_only_once_more(
    hub: FakeHub, cache: Path
) -> None:
    hub.manners["a.safetensors"].stated_sha256 = "5" * 64
    job = await job_of(hub, cache, "a.safetensors")
    part = RepoCache(cache, REPO).partial(job.files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])

    assert (await refusal(job)).kind == "checksum_mismatch"
    assert len(hub.received) == 2


async def test_a_file_that_fails_ends_the_others(hub: FakeHub, cache: Path) -> None:
    hub.manners["a.safetensors"].stated_sha256 = "5" * 64
    hub.manners["b.safetensors"].stops = [1000]

    assert (await refusal(await job_of(hub, cache))).kind == "checksum_mismatch"


# others who want the same


async def test_whoever_comes_second_waits_and_sees_how_far_it_is(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.0)
    job = await job_of(hub, cache, "a.safetensors")
    [file] = job.files
    repo = RepoCache(cache, REPO)
    repo.partial(file).parent.mkdir(parents=True)
    said: list[AnyReport] = []
    async with asyncio.TaskGroup() as tasks, locked(repo.lock(file)):
        tasks.create_task(download(job, said.append, HubClient(job.access, AT_ONCE)))
        await until(lambda: Downloaded(0) in said)
        repo.partial(file).write_bytes(CONTENT[:5000])
        await until(lambda: Downloaded(5000) in said)
        repo.partial(file).write_bytes(CONTENT)
        repo.partial(file).replace(repo.blob(file))

    assert said[-1] == Downloaded(len(CONTENT))
    assert hub.received == []


async def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    order: list[str] = []

    async def second() -> None:
        async with locked(path, waiting=lambda: order.append("waits")):
            order.append("has it")
            assert path.exists()

    async with asyncio.TaskGroup() as tasks, locked(path):
        tasks.create_task(second())
        await until(lambda: "waits" in order)
        path.unlink()

    assert order[-1] == "has it"


# the disk


async def test_a_cache_that_cannot_be_written_is_said_in_words(
    hub: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    job = await job_of(hub, tmp_path / "file")

    with pytest.raises(OSError, match="Not a directory") as refused:
        await do(job)

    failed = failure_of(refused.value, job.cache)
    assert (failed.kind, job.cache in failed.message) == ("fetch_failed", True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_filled_up_is_named(number: int) -> None:
    failed = failure_of(OSError(number, "whatever"), "/cache")

    assert failed == DownloadFailed(
        "the cache /cache could not be written: the disk is full", "disk_full"
    )


def test_a_refusal_keeps_its_numbers() -> None:
    exc = Unloadable("no", kind="checksum_mismatch", expected="5", got="6")

    assert failure_of(exc, "/cache") == DownloadFailed(
        "no", "checksum_mismatch", {"expected": "5", "got": "6"}
    )
