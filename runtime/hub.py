"""Models from a Hugging Face-compatible hub: found, judged before they are fetched, fetched.

    look     which files a load needs, from the repository's listing
    examine  what their headers say, a few hundred kilobytes by HTTP range
    fetch    all of it into the cache, by a child process (``hub_download.py``)

A revision that is a commit, and is here, needs no network. For a branch or a tag the hub is asked
where it is now; where the hub cannot be reached, what is here serves. Offline nobody is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from cortex.ipc.downloads import (
    AnyReport,
    Downloaded,
    DownloadEnded,
    DownloadFailed,
    DownloadJob,
    HubAccess,
)
from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.runtime import hub_cache
from cortex.runtime.hub_cache import RepoCache
from cortex.runtime.hub_client import HubClient, Patience
from cortex.runtime.hub_files import HubSource
from cortex.runtime.hub_headers import RemoteModel, look, read_headers
from cortex.runtime.wheel import OnProgress, refuse_full_disk

KEPT_HEADERS = 4
ASKING = Patience(attempts=3, first_seconds=0.5, longest_asked_seconds=30.0)
"""For listings and headers: somebody waits for an answer."""
GLANCING = Patience(attempts=1, connect_seconds=3.0, silence_seconds=10.0)
"""Where what is here serves as well."""

PASSING = frozenset({"network_unreachable", "hub_failed", "rate_limited"})
"""What says nothing of the model, so that what is here serves meanwhile."""

CHILD = (sys.executable, "-m", "cortex.runtime.hub_download")

_REPORT: msgspec.json.Decoder[AnyReport] = msgspec.json.Decoder(AnyReport)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Which hub, and where what comes from it lies."""

    access: HubAccess
    cache: Path
    is_offline: bool = False


class Hub:
    """The hub of this neuron. Every call may raise Unloadable."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._headers: dict[tuple[str, str, str], Checkpoint] = {}

    def find(self, source: HubSource, quant: str | None) -> Path | None:
        """Return what a load would open, if it is here; without network."""
        return hub_cache.find(self._settings.cache, source, quant)

    def path_of(self, model: RemoteModel) -> Path | None:
        """Return what a load of *model* opens, if all of it is here."""
        repo = RepoCache(self._settings.cache, model.source.repo)
        if not all(repo.has(model.commit, file) for file in model.files):
            return None
        return repo.snapshot(model.commit) / (model.gguf.path if model.gguf else "")

    def bytes_here(self, model: RemoteModel) -> int:
        """Return how much of *model* need not be fetched any more."""
        repo = RepoCache(self._settings.cache, model.source.repo)
        return sum(repo.bytes_here(file) for file in model.files)

    async def look(self, source: HubSource, quant: str | None) -> RemoteModel | None:
        """Return which files are needed, or None where what is here serves."""
        here = await asyncio.to_thread(self.find, source, quant)
        if here is not None and (source.is_commit or self._settings.is_offline):
            return None
        self._refuse_offline(source, quant)
        async with self._client(ASKING if here is None else GLANCING) as client:
            try:
                return await look(client, source, await client.listing(source), quant)
            except Unloadable as exc:
                if here is None or exc.kind not in PASSING:
                    raise
                _log.warning("hub not asked, cached model used", model=str(source), why=str(exc))
                return None

    async def examine(self, model: RemoteModel) -> Checkpoint:
        """Return the checkpoint that *model* would be, from its headers."""
        key = (model.source.repo, model.commit, model.files[-1].path)
        if key not in self._headers:
            async with self._client(ASKING) as client:
                self._headers[key] = await read_headers(client, model)
            while len(self._headers) > KEPT_HEADERS:
                del self._headers[next(iter(self._headers))]
        return self._headers[key]

    async def fetch(self, model: RemoteModel, on_progress: OnProgress) -> Path:
        """Bring *model* into the cache and return what a load opens.

        Cancelling it kills the download at once; what came so far is continued from next time.
        """
        repo = RepoCache(self._settings.cache, model.source.repo)
        if (here := await asyncio.to_thread(self.path_of, model)) is not None:
            with contextlib.suppress(OSError):  # a cache that is only read serves as well
                await asyncio.to_thread(repo.remember, model.source.revision, model.commit)
            return here
        await asyncio.to_thread(self._refuse_full_disk, model)
        job = DownloadJob(
            self._settings.access,
            str(self._settings.cache),
            model.source.repo,
            model.source.revision,
            model.commit,
            model.files,
        )
        total = model.size_bytes
        await run_download(job, lambda done: on_progress(min(done, total), total))
        return repo.snapshot(model.commit) / (model.gguf.path if model.gguf else "")

    def _client(self, patience: Patience) -> HubClient:
        return HubClient(self._settings.access, patience)

    def _refuse_full_disk(self, model: RemoteModel) -> None:
        cache = self._settings.cache
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise Unloadable(
                f"the cache {cache} could not be written: {exc.strerror}", kind="fetch_failed"
            ) from exc
        refuse_full_disk(cache, model.size_bytes - self.bytes_here(model))

    def _refuse_offline(self, source: HubSource, quant: str | None) -> None:
        if self._settings.is_offline:
            what = f"{source} with quant {quant}" if quant else f"{source} (safetensors)"
            raise Unloadable(
                f"{what} is not in {self._settings.cache}, and this neuron is offline",
                kind="not_cached",
            )


async def run_download(
    job: DownloadJob, on_bytes: Callable[[int], None], command: Sequence[str] = CHILD
) -> None:
    """Let a child process do *job*; raise Unloadable. Cancelling it kills the child."""
    process = await asyncio.create_subprocess_exec(
        *(*command, str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is ours to answer
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.TaskGroup() as tasks:
            words = tasks.create_task(process.stderr.read())
            tasks.create_task(_give(process, job))
            last = tasks.create_task(_follow(process.stdout, on_bytes))
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    match last.result():
        case DownloadEnded():
            return
        case DownloadFailed(message, kind, numbers):
            raise Unloadable(message, kind=kind, **numbers)
        case None:
            lines = words.result().decode(errors="replace").strip().splitlines()
            why = f"exit status {status}" if status >= 0 else f"signal {-status}"
            raise Unloadable(
                f"the download of {job.repo} ended with {': '.join([why, *lines[-1:]])}",
                kind="fetch_failed",
            )


async def _give(process: asyncio.subprocess.Process, job: DownloadJob) -> None:
    """Send the job; a child that is gone already says so by its end."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(job))
        await process.stdin.drain()
    process.stdin.close()


async def _follow(
    reports: asyncio.StreamReader, on_bytes: Callable[[int], None]
) -> DownloadEnded | DownloadFailed | None:
    """Return the report that ends the download, None where the child ended without one."""
    async for line in reports:
        report = _REPORT.decode(line)
        if not isinstance(report, Downloaded):
            return report
        on_bytes(report.bytes_done)
    return None
