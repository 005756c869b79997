"""Pieces of a checkpoint into memory, by several threads at once.

    readers    take the next piece, read it, see it to its place ── bytes, or an error ──► queue
    caller     takes what they say from the queue, tells how far the load is, stops them all

Reading beats mapping here: a file may be replaced or go away while the model serves, a damaged one
is an error and not a SIGBUS, and every page is in memory before the first request. Pieces are taken
in the order of their files. Of rows that a rank holds in part whole runs are read, a bounded buffer
at a time, and the rest is dropped: on the way from a disk the gaps cost less than the seeks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import open_file
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.sources import Source
from cortex.models.staging import Lane, Piece

PIECE_BYTES = 1 << 23  # how often progress is told and a cancelled load can stop
GAPS_BYTES = 1 << 20  # read at once where of each row a part is wanted

Progress = Callable[[int, int], None]

ReadAt = Callable[[int, Sequence[memoryview], int], int]
"""``os.preadv``."""


class Files:
    """The open files of a checkpoint, which any number of threads may read."""

    def __init__(self, preadv: ReadAt = os.preadv) -> None:
        self._preadv = preadv
        self._opened: dict[Path, FileIO] = {}
        self._lock = threading.Lock()
        self._closing = ExitStack()

    def close(self) -> None:
        """Close them all."""
        self._closing.close()

    def read(self, source: Source, view: memoryview) -> None:
        """Fill *view* with the wanted bytes of *source*; raises CheckpointError."""
        with naming(source.tensor.path):
            if source.kept == ((0, source.row_bytes),):
                self._fill(view, source.tensor, source.offset)
            else:
                self._fill_by_rows(view, source)

    def _fill_by_rows(self, view: memoryview, source: Source) -> None:
        wanted = np.frombuffer(view, np.uint8).reshape(source.rows, source.kept_bytes)
        at_once = max(1, GAPS_BYTES // source.row_bytes)
        buffer = np.empty((min(at_once, source.rows), source.row_bytes), np.uint8)
        begin, end = source.kept[0][0], source.row_bytes - source.kept[-1][1]
        for first in range(0, source.rows, at_once):
            rows = buffer[: min(at_once, source.rows - first)]
            run = rows.reshape(-1).data[begin : rows.size - end]
            self._fill(run, source.tensor, source.offset + first * source.row_bytes + begin)
            column = 0
            for start, stop in source.kept:
                width = stop - start
                wanted[first : first + len(rows), column : column + width] = rows[:, start:stop]
                column += width

    def _fill(self, view: memoryview, tensor: TensorInfo, offset: int) -> None:
        descriptor = self._descriptor(tensor.path)
        while view:
            count = self._preadv(descriptor, [view], offset)
            if not count:
                raise CheckpointError(f"the file ended within tensor {shown(tensor.name)}")
            view = view[count:]
            offset += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._opened:
                self._opened[path] = self._closing.enter_context(open_file(path))
            return self._opened[path].fileno()


def read_pieces(
    pieces: Sequence[Piece],
    lanes: Sequence[Lane],
    on_progress: Progress,
    *,
    files: Files,
    in_thread: Callable[[], AbstractContextManager[object]],
) -> None:
    """Read *pieces*, one thread to each of *lanes*, in which *in_thread* is entered.

    *on_progress* gets the bytes of weights in place and in total, in this thread. What it raises,
    and the first error of a reader, end the others before it is raised here; CheckpointError names
    the file.
    """
    total, done = sum(piece.weights_bytes for piece in pieces), 0
    readers = _Readers(pieces, files, in_thread)
    try:
        readers.start(lanes)
        for _ in pieces:
            done += readers.next()
            on_progress(done, total)
    finally:
        readers.stop()


class _Readers:
    """The threads, and what they say of each piece: its bytes, or an error."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        files: Files,
        in_thread: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._waiting = _in_order_of_files(pieces)
        self._lock = threading.Lock()
        self._files = files
        self._in_thread = in_thread
        self._said: SimpleQueue[int | BaseException] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            thread = threading.Thread(target=self._run, args=(lane,), name="reader", daemon=True)
            thread.start()
            self._threads.append(thread)

    def next(self) -> int:
        """Return the bytes of weights that are there now, or raise a reader's error."""
        said = self._said.get()
        try:
            if isinstance(said, BaseException):
                raise said
            return said
        finally:
            del said  # else error and frame hold each other, and the frame the model

    def stop(self) -> None:
        """Have every reader end after the piece it is in, and wait for that."""
        with self._lock:
            self._waiting = iter(())
        for thread in self._threads:
            thread.join()

    def _run(self, lane: Lane) -> None:
        try:
            with self._in_thread():
                while (piece := self._take()) is not None:
                    lane.carry(piece, partial(self._read, piece))
                    self._said.put(piece.weights_bytes)
        except BaseException as exc:  # noqa: BLE001 - the caller raises it
            self._said.put(exc)

    def _take(self) -> Piece | None:
        with self._lock:
            return next(self._waiting, None)

    def _read(self, piece: Piece, view: memoryview) -> None:
        first = 0
        for source in piece.sources:
            self._files.read(source, view[first : first + source.nbytes])
            first += source.nbytes
        if piece.check:
            piece.check(view)


def _in_order_of_files(pieces: Sequence[Piece]) -> Iterator[Piece]:
    return iter(sorted(pieces, key=lambda p: (p.sources[0].tensor.path, p.sources[0].offset)))
