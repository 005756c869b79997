"""What quantising a checkpoint gave, kept in a file, from where the next load reads it.

One file for each checkpoint, kind and rank, named for all that it follows from; so one whose
checkpoint has changed is not found again, and in time makes room. A file is

    rows of the matrices, packed, in runs │ footer, JSON │ its length, u64 little endian │ MAGIC
    {"<matrix>/<part>": {"kind": "Q4_0", "row_bytes": 36, "offset": 0, "runs": [[rows, crc32], …]}}

It appears under its name once it is whole and on the disk. All of them take at most half of what
they and the free space of their file system are together; the one longest unused goes first.
Nothing that is wrong with a file is an error of the load: then the checkpoint is quantised again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from cortex.models.checkpoints.errors import CheckpointError, naming
from cortex.models.checkpoints.files import open_file
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.sources import Source

MAGIC = b"cortexpk"
FORMAT = 1
"""Raise it with any change to the file, or to what a kind's blocks hold."""

SUFFIX, UNFINISHED = ".packed", ".unfinished"
MAX_FOOTER_BYTES = 1 << 27

log = logging.getLogger(__name__)


class Damaged(CheckpointError):
    """A kept file is not what was written."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that were written at once, and what their bytes sum up to."""

    source: Source
    crc32: int

    def check(self, view: memoryview) -> None:
        """Raise Damaged where *view* is not what was written."""
        if zlib.crc32(view) != self.crc32:
            raise Damaged(f"{self.source.tensor.path}: {self.source.tensor.name} is damaged")


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A kept file: the runs of its parts by name."""

    path: Path
    parts: dict[str, tuple[Run, ...]]

    def runs(self, name: str, kind: str, rows: int, row_bytes: int) -> tuple[Run, ...]:
        """Return a part's, in order; raise Damaged where they are of another shape."""
        runs = self.parts.get(name, ())
        first = runs[0].source if runs else None
        is_it = first and (first.tensor.type, first.row_bytes) == (kind, row_bytes)
        if not is_it or sum(run.source.rows for run in runs) != rows:
            raise Damaged(f"{self.path}: {name} is not the one that was written")
        return runs


class PackedCache:
    """The kept files of one directory, from the view of one load, which is called *key*."""

    def __init__(self, directory: Path, key: str) -> None:
        self._directory = directory
        self._path = directory / f"{key}{SUFFIX}"

    def find(self) -> PackedFile | None:
        """Return the file of this load, if there is one and it is whole."""
        try:
            with naming(self._path):
                found = PackedFile(self._path, _parts(self._path))
            os.utime(self._path)
        except FileNotFoundError:
            return None
        except (CheckpointError, OSError) as exc:
            if not isinstance(exc.__cause__, FileNotFoundError):
                log.warning("quantised weights are made anew: %s", exc)
                self.discard()
            return None
        return found

    def discard(self) -> None:
        """Remove the file of this load."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def new_file(self) -> NewFile | None:
        """Return a file to write; None where there can be none, or another load writes it."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return NewFile.open(self._path)
        except OSError as exc:
            log.warning("quantised weights are not kept: %s", exc)
            return None

    def make_room(self, nbytes: int) -> bool:
        """Remove old files so that *nbytes* more may be kept; whether they may."""
        try:
            kept = sorted(self._others(), key=lambda file: file[1].st_mtime_ns)
            taken = sum(status.st_size for _, status in kept)
            usable = os.statvfs(self._directory)
            most = (taken + usable.f_bavail * usable.f_frsize) // 2
            for path, status in kept:
                if taken + nbytes <= most:
                    break
                path.unlink()
                taken -= status.st_size
        except OSError as exc:
            log.warning("quantised weights are not kept: %s", exc)
            return False
        return taken + nbytes <= most

    def _others(self) -> Iterable[tuple[Path, os.stat_result]]:
        """Return the files of other loads; of those that nobody finishes none is left."""
        for path in self._directory.iterdir():
            if path.suffix == UNFINISHED:
                _remove_unless_written(path)
            elif path.suffix == SUFFIX and path != self._path:
                yield path, path.stat()


class NewFile:
    """A file that is being written, by several threads."""

    def __init__(self, path: Path, unfinished: Path, file: FileIO) -> None:
        self._path = path
        self._unfinished = unfinished
        self._file = file
        self._parts: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, dict[int, tuple[int, int]]] = {}
        self._end = 0
        self._lock = threading.Lock()
        self._failure: OSError | None = None

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Make the file that becomes *path*; None where another load is writing it."""
        unfinished = path.with_suffix(UNFINISHED)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = FileIO(descriptor, "r+")
        if not _is_ours(file):
            file.close()
            return None
        file.truncate(0)
        return cls(path, unfinished, file)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self._end

    def add(self, name: str, kind: str, rows: int, row_bytes: int) -> None:
        """Make room for a part."""
        self._parts[name] = {"kind": kind, "row_bytes": row_bytes, "offset": self._end}
        self._runs[name] = {}
        self._end += rows * row_bytes

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Write *rows*, uint8 [rows, bytes], as those of a part from the *first* on."""
        part, view = self._parts[name], rows.cpu().contiguous().numpy().data.cast("B")
        with self._lock:
            self._runs[name][first] = (rows.size(0), zlib.crc32(view))
        try:
            _write(self._file.fileno(), view, part["offset"] + first * part["row_bytes"])
        except OSError as exc:
            self._failure = exc

    def finish(self) -> None:
        """Put the file in its place, if it could be written."""
        try:
            if self._failure:
                raise self._failure
            for name, runs in self._runs.items():
                self._parts[name]["runs"] = [runs[first] for first in sorted(runs)]
            footer = json.dumps(self._parts).encode()
            end = footer + len(footer).to_bytes(8, "little") + MAGIC
            _write(self._file.fileno(), memoryview(end), self._end)
            os.fsync(self._file.fileno())
            self._unfinished.replace(self._path)
        except OSError as exc:
            log.warning("quantised weights are not kept: %s", exc)
            self.abandon()
        self._file.close()

    def abandon(self) -> None:
        """Leave no file; after ``finish`` it does nothing."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._unfinished.unlink()
            self._file.close()


def key_of(paths: Iterable[Path], *recipe: object) -> str:
    """Return the name of what *recipe* makes of the files at *paths*; raises CheckpointError.

    The files are known by where they lie, how large they are and when they were written.
    """
    digest = sha256(repr((FORMAT, *recipe)).encode())
    for path in sorted(set(paths)):
        with naming(path):
            status = path.stat()
            name = os.path.realpath(path)
        digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:40]


def _parts(path: Path) -> dict[str, tuple[Run, ...]]:
    """Read the footer of a file; raises CheckpointError for anything that is wrong with it."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        end = os.pread(file.fileno(), 16, max(0, size - 16))
        length = int.from_bytes(end[:8], "little")
        if end[8:] != MAGIC or length > min(MAX_FOOTER_BYTES, size - 16):
            raise Damaged("has no footer")
        footer = os.pread(file.fileno(), length, size - 16 - length)
    try:
        return {
            name: _runs(path, name, size - 16 - length, **part)
            for name, part in json.loads(footer).items()
        }
    except (ValueError, TypeError, AttributeError) as exc:
        raise Damaged(f"has a footer that is none: {exc}") from exc


def _runs(
    path: Path,
    name: str,
    data_bytes: int,
    *,
    kind: str,
    row_bytes: int,
    offset: int,
    runs: list[tuple[int, int]],
) -> tuple[Run, ...]:
    rows = sum(count for count, _ in runs)
    if min(row_bytes, offset) < 0 or offset + rows * row_bytes > data_bytes:
        raise Damaged(f"{name} lies beyond its end")
    tensor = TensorInfo(name, (rows, row_bytes), kind, path, offset, rows * row_bytes)
    firsts = accumulate((count for count, _ in runs), initial=0)
    return tuple(
        Run(Source(tensor, first, count, row_bytes, ((0, row_bytes),)), crc32)
        for first, (count, crc32) in zip(firsts, runs, strict=False)
    )


def _remove_unless_written(unfinished: Path) -> None:
    with contextlib.suppress(OSError), FileIO(unfinished, "r+") as file:
        if _is_ours(file):
            unfinished.unlink()


def _is_ours(file: FileIO) -> bool:
    """Lock *file* until it is closed, unless another process or load has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
