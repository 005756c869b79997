"""The child process that downloads from a hub: ``python -m cortex.runtime.hub_download PARENT``.

A process of its own, so that hashing and writing a gigabyte per second takes nothing from the
streams that the supervisor serves, and so that a kill stops it at once wherever it is. The kernel
kills it when its parent goes (prctl's PR_SET_PDEATHSIG).

Every file is locked while it is fetched, for whoever else wants it; what came so far lies in
``<hash>.incomplete``, and whoever comes next goes on from there. It becomes a blob when its size
and, where the hub states one, its SHA-256 are right. Bytes that somebody else left there are not
trusted: when a file that was continued turns out wrong, it is fetched once more from the start, and
one whose checksum is not stated, which is small, always is. A link in its place is not followed.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

import msgspec

from cortex.ipc.downloads import (
    AnyReport,
    Downloaded,
    DownloadEnded,
    DownloadFailed,
    DownloadJob,
    RepoFile,
)
from cortex.ipc.errors import Unloadable
from cortex.runtime.file_lock import locked
from cortex.runtime.hub_cache import RepoCache
from cortex.runtime.hub_client import HubClient
from cortex.runtime.hub_files import HubSource

PR_SET_PDEATHSIG = 1
REPORT_SECONDS = 0.2
READ_BYTES = 2**20

Say = Callable[[AnyReport], None]


async def download(job: DownloadJob, say: Say, client: HubClient | None = None) -> None:
    """Do *job*; raise Unloadable, or OSError where the cache cannot be written."""
    async with client or HubClient(job.access) as hub:
        await _Download(job, say, hub).run()


class _Download:
    """One job, under way."""

    def __init__(self, job: DownloadJob, say: Say, hub: HubClient) -> None:
        self._job = job
        self._say = say
        self._hub = hub
        self._source = HubSource(job.repo, job.revision)
        self._cache = RepoCache(Path(job.cache), job.repo)
        self._places = asyncio.Semaphore(job.access.parallel_files)
        self._done = {file.blob: self._cache.bytes_here(file) for file in job.files}
        self._told = -1
        self._told_at = 0.0

    async def run(self) -> None:
        """Fetch every file and give each its name; the first that fails ends the others."""
        self._tell()
        try:
            async with asyncio.TaskGroup() as tasks:
                for file in self._job.files:
                    tasks.create_task(self._bring(file))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        self._cache.remember(self._job.revision, self._job.commit)
        self._tell()

    async def _bring(self, file: RepoFile) -> None:
        blob = self._cache.blob(file)
        async with (
            self._places,
            locked(self._cache.lock(file), waiting=lambda: self._look_at(file)),
        ):
            if not blob.exists():
                await self._fetch(file)
            self._count(file, file.size_bytes)
            self._cache.link(self._job.commit, file)

    async def _fetch(self, file: RepoFile) -> None:
        part = self._cache.partial(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        was_continued = part.exists() and part.stat().st_size > 0
        try:
            await self._continue(file, part)
        except Unloadable as exc:
            if exc.kind != "checksum_mismatch":
                raise
            part.unlink(missing_ok=True)
            if not was_continued:
                raise
            await self._continue(file, part)
        part.replace(self._cache.blob(file))

    async def _continue(self, file: RepoFile, part: Path) -> None:
        """Bring *part* to its end and check it; raise Unloadable."""
        with _opened(part) as out:
            partial = _Partial(out, file)
            await asyncio.to_thread(partial.take_up)
            rest = self._hub.chunks(
                self._source, self._job.commit, file, partial.size_bytes, file.size_bytes
            )
            async with aclosing(rest):
                async for chunk in rest:
                    await asyncio.to_thread(partial.add, chunk)
                    self._count(file, partial.size_bytes)
            await asyncio.to_thread(partial.finish)

    def _look_at(self, file: RepoFile) -> None:
        """See how far the process is that holds the lock of *file*."""
        self._count(file, self._cache.bytes_here(file))

    def _count(self, file: RepoFile, size_bytes: int) -> None:
        self._done[file.blob] = size_bytes
        now = asyncio.get_running_loop().time()
        if now - self._told_at >= REPORT_SECONDS:
            self._told_at = now
            self._tell()

    def _tell(self) -> None:
        total = sum(self._done[file.blob] for file in self._job.files)
        if total > self._told:  # a file that is fetched again does not turn the clock back
            self._told = total
            self._say(Downloaded(total))


class _Partial:
    """A file as it grows, with its checksum; every call blocks."""

    def __init__(self, out: BinaryIO, file: RepoFile) -> None:
        self._out = out
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def take_up(self) -> None:
        """Hash what is there already; what is longer, or cannot be checked, is none of it."""
        is_longer = self._out.seek(0, os.SEEK_END) > self._file.size_bytes
        if is_longer or self._file.sha256 is None:
            self._out.truncate(0)
        self._out.seek(0)
        while chunk := self._out.read(READ_BYTES):
            self._digest.update(chunk)
            self.size_bytes += len(chunk)

    def add(self, chunk: bytes) -> None:
        self._out.write(chunk)
        self._out.flush()  # so that a kill loses nothing, and others see how far it is
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def finish(self) -> None:
        """Put it on the disk; raise Unloadable where it is not what the hub stated."""
        os.fsync(self._out.fileno())
        got = self._digest.hexdigest()
        if self._file.sha256 not in (None, got):
            raise Unloadable(
                f"the checksum of {self._file.path} differs: "
                f"expected {self._file.sha256}, got {got}",
                kind="checksum_mismatch",
                expected=self._file.sha256,
                got=got,
            )


def _opened(part: Path) -> BinaryIO:
    """Open *part*, but no link: in a shared cache it could lead to a file of ours."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(part, flags, 0o666), "ab+")


def failure_of(exc: Unloadable | OSError, cache: str) -> DownloadFailed:
    """Return what the parent has to be told."""
    if isinstance(exc, Unloadable):
        numbers = {name: value for name, value in exc.extras.items() if name != "kind"}
        return DownloadFailed(str(exc), exc.kind, numbers)
    is_full = exc.errno in {errno.ENOSPC, errno.EDQUOT}
    why = "the disk is full" if is_full else exc.strerror or str(exc)
    kind = "disk_full" if is_full else "fetch_failed"
    return DownloadFailed(f"the cache {cache} could not be written: {why}", kind)


def main(parent: int) -> None:
    """Do the job that comes on stdin, and report on stdout."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        sys.exit(1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=DownloadJob)
    try:
        asyncio.run(download(job, _print))
    except (Unloadable, OSError) as exc:
        _print(failure_of(exc, job.cache))
    else:
        _print(DownloadEnded())


def _print(report: AnyReport) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
