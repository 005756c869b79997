"""Reading by several threads: every byte once, errors in words, and an end for all of them."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.sources import Source
from cortex.models.staging import Piece
from tiny_loads import CountedReads, read

ROW = 16


def source(path: Path, first: int = 0, rows: int = 1) -> Source:
    size = path.stat().st_size if path.exists() else ROW
    tensor = TensorInfo(path.name, (size // ROW, ROW), "F32", path, 0, size)
    return Source(tensor, first, rows, ROW, ((0, ROW),))


def pieces_of(path: Path, count: int) -> tuple[list[Piece], Tensor]:
    """Write a file of *count* rows; return pieces of one row each, and where they go."""
    path.write_bytes(os.urandom(count * ROW))
    place = torch.zeros(count, ROW, dtype=torch.uint8)
    return [Piece((source(path, row),), into=place[row]) for row in range(count)], place


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


def open_files() -> set[str]:
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_piece_is_read_once(tmp_path: Path, count: int) -> None:
    path = tmp_path / "file"
    pieces, place = pieces_of(path, 40)
    reads = CountedReads()

    read(pieces, readers=count, preadv=reads)

    assert place.numpy().tobytes() == path.read_bytes()
    assert sorted(reads.runs) == [(row * ROW, ROW) for row in range(40)]
    assert not readers()
    assert str(path) not in open_files()


def test_pieces_are_read_in_the_order_of_their_files(tmp_path: Path) -> None:
    (first, _), (second, _) = (pieces_of(tmp_path / name, 3) for name in "ab")
    told: list[int] = []

    def at(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        is_second = Path(f"/proc/self/fd/{descriptor}").readlink().name == "b"
        told.append(offset + 100 * ROW * is_second)
        return os.preadv(descriptor, list(views), offset)

    read([*second, *reversed(first)], readers=1, preadv=at)

    assert told == sorted(told)


def test_a_piece_may_be_of_several_sources(tmp_path: Path) -> None:
    pieces_of(tmp_path / "a", 3)
    pieces_of(tmp_path / "b", 3)
    place = torch.zeros(3 * ROW, dtype=torch.uint8)

    read([Piece((source(tmp_path / "b", 1, 2), source(tmp_path / "a", 2)), into=place)])

    stored = (tmp_path / "b").read_bytes()[ROW:] + (tmp_path / "a").read_bytes()[2 * ROW :]
    assert place.numpy().tobytes() == stored


def test_a_read_that_gives_less_is_continued(tmp_path: Path) -> None:
    pieces, place = pieces_of(tmp_path / "file", 4)

    def short(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [views[0][:5]], offset)

    read(pieces, preadv=short)

    assert place.numpy().tobytes() == (tmp_path / "file").read_bytes()


def test_progress_is_told_in_the_thread_that_loads(tmp_path: Path) -> None:
    pieces, _ = pieces_of(tmp_path / "file", 10)
    told: list[tuple[int, int]] = []
    threads: set[int] = set()

    def on_progress(done: int, total: int) -> None:
        told.append((done, total))
        threads.add(threading.get_ident())

    read(pieces, on_progress=on_progress)

    assert told == [(row * ROW, 10 * ROW) for row in range(1, 11)]
    assert threads == {threading.get_ident()}


def test_a_cancelled_load_stops_every_reader(tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    pieces, _ = pieces_of(tmp_path / "file", 1000)
    reads = CountedReads()
    cancelled = threading.Event()

    def slow(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if reads.runs:
            cancelled.wait()
            sum(range(30000))  # all of them would take a second
        return reads(descriptor, views, offset)

    def cancel(done: int, total: int) -> None:
        cancelled.set()
        raise Cancelled

    with pytest.raises(Cancelled):
        read(pieces, preadv=slow, on_progress=cancel, readers=3)

    assert len(reads.runs) < 1000
    assert not readers()
    assert str(tmp_path / "file") not in open_files()


def test_what_a_cancelled_load_had_is_free_at_once(tmp_path: Path) -> None:
    pieces, place = pieces_of(tmp_path / "file", 10)
    freed = threading.Event()
    weakref.finalize(place, freed.set)
    del place

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(pieces, on_progress=cancel)
    del pieces

    assert freed.is_set()


def test_what_a_failed_load_had_is_free_without_a_collection(tmp_path: Path) -> None:
    pieces, place = pieces_of(tmp_path / "file", 1)
    freed = threading.Event()
    weakref.finalize(place, freed.set)
    pieces = [Piece(pieces[0].sources, land=partial(fail_with, place))]
    del place
    gc.collect()
    gc.disable()

    try:
        with suppress(RuntimeError):
            read(pieces)
        del pieces

        assert freed.is_set()
    finally:
        gc.enable()


def fail_with(place: Tensor, stored: Tensor) -> None:
    raise RuntimeError("the device is gone")


@pytest.mark.parametrize("reader_count", [1, 3])
def test_the_error_of_a_reader_names_its_file(tmp_path: Path, reader_count: int) -> None:
    pieces, _ = pieces_of(tmp_path / "file", 10)
    missing = Piece((source(tmp_path / "gone"),), into=torch.zeros(ROW, dtype=torch.uint8))

    with pytest.raises(CheckpointError, match=r"/gone: cannot be read: No such file"):
        read([*pieces, missing], readers=reader_count)

    assert not readers()


def test_a_file_that_ends_too_soon_is_named_with_its_tensor(tmp_path: Path) -> None:
    pieces, _ = pieces_of(tmp_path / "file", 10)
    (tmp_path / "file").write_bytes(bytes(5 * ROW + 3))

    with pytest.raises(CheckpointError, match=r"/file: the file ended within tensor 'file'"):
        read(pieces)


def test_an_error_of_the_disk_is_in_words(tmp_path: Path) -> None:
    pieces, _ = pieces_of(tmp_path / "file", 1)

    def broken(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(CheckpointError, match=r"/file: cannot be read: Input/output error"):
        read(pieces, preadv=broken)


def test_an_error_on_the_way_to_its_place_ends_the_load(tmp_path: Path) -> None:
    pieces_of(tmp_path / "file", 1)

    def land(stored: Tensor) -> None:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        read([Piece((source(tmp_path / "file"),), land=land)])

    assert not readers()


def test_nothing_to_read_is_read(tmp_path: Path) -> None:
    read([])

    assert not readers()
