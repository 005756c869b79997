"""Quantised weights that are kept: found again, bounded, and no trouble when they are damaged."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.packed_cache import MAGIC, Damaged, NewFile, PackedCache, key_of
from cortex.models.staging import Piece
from tiny_loads import read

KEY = "0123"


def packed(rows: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(256, (rows, 18), dtype=torch.uint8)


def keep(directory: Path, key: str = KEY, parts: tuple[Tensor, ...] = ()) -> None:
    """Keep a file of *parts*, their last rows first and two at a time."""
    new = PackedCache(directory, key).new_file()
    assert new
    for number, part in enumerate(parts):
        new.add(f"m/{number}", "Q4_0", len(part), 18)
    for number, part in enumerate(parts):
        for first in reversed(range(0, len(part), 2)):
            new.write(f"m/{number}", first, part[first : first + 2])
    new.finish()


def kept(directory: Path, rows: int, number: int = 0) -> Tensor:
    """Read a part that was kept, by its runs."""
    found = PackedCache(directory, KEY).find()
    assert found
    place = torch.zeros(rows, 18, dtype=torch.uint8)
    pieces, first = [], 0
    for run in found.runs(f"m/{number}", "Q4_0", rows, 18):
        end = first + run.source.rows
        pieces.append(Piece((run.source,), into=place[first:end], check=run.check))
        first = end
    read(pieces)
    return place


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    parts = (packed(5), packed(8, seed=1))

    keep(tmp_path / "made", parts=parts)

    assert torch.equal(kept(tmp_path / "made", 5), parts[0])
    assert torch.equal(kept(tmp_path / "made", 8, 1), parts[1])
    assert [path.name for path in (tmp_path / "made").iterdir()] == [f"{KEY}.packed"]


def test_nothing_is_found_where_nothing_was_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tmp_path, "other", (packed(2),))

    assert PackedCache(tmp_path, KEY).find() is None
    assert PackedCache(tmp_path / "nowhere", KEY).find() is None
    assert not caplog.records


@pytest.mark.parametrize("left", [0, 1, 15, 16, 90, -1, -8, -16, -30])
def test_a_file_that_was_cut_off_is_not_used(
    tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tmp_path, parts=(packed(5),))
    path = tmp_path / f"{KEY}.packed"
    path.write_bytes(path.read_bytes()[:left])

    assert PackedCache(tmp_path, KEY).find() is None
    assert not path.exists()
    assert "quantised weights are made anew" in caplog.text


def footer(text: bytes) -> bytes:
    return text + len(text).to_bytes(8, "little") + MAGIC


@pytest.mark.parametrize(
    "content",
    [
        footer(b"{}")[:-1] + b"!",
        footer(b"no JSON"),
        footer(b"[]"),
        footer(b'{"m/0": 3}'),
        footer(b'{"m/0": {"kind": "Q4_0"}}'),
        footer(b'{"m/0": {"kind": "Q4_0", "row_bytes": 18, "offset": 0, "runs": [[1, 2]]}}'),
        footer(b'{"m/0": {"kind": "Q4_0", "row_bytes": -1, "offset": 0, "runs": [[1, 2]]}}'),
        footer(b'{"m/0": {"kind": "Q4_0", "row_bytes": 18, "offset": 0, "runs": 7}}'),
        footer(b'{"m/0": {"kind": "Q4_0", "row_bytes": "x", "offset": 0, "runs": []}}'),
        b"\xff" * 16,
        (1 << 62).to_bytes(8, "little") + MAGIC,
    ],
)
def test_a_file_that_is_none_of_ours_is_not_used(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{KEY}.packed").write_bytes(content)

    assert PackedCache(tmp_path, KEY).find() is None
    assert not list(tmp_path.iterdir())


def test_a_pipe_under_its_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{KEY}.packed")

    assert PackedCache(tmp_path, KEY).find() is None


@pytest.mark.parametrize("place", [0, 17, 18, 89])
def test_a_byte_that_changed_is_seen(tmp_path: Path, place: int) -> None:
    keep(tmp_path, parts=(packed(5),))
    path = tmp_path / f"{KEY}.packed"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    with pytest.raises(Damaged, match="m/0 is damaged"):
        kept(tmp_path, 5)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "row_bytes"),
    [
        ("m/1", "Q4_0", 5, 18),
        ("m/0", "Q4_1", 5, 18),
        ("m/0", "Q4_0", 6, 18),
        ("m/0", "Q4_0", 5, 20),
    ],
)
def test_a_part_of_another_shape_is_not_taken(
    tmp_path: Path, name: str, kind: str, rows: int, row_bytes: int
) -> None:
    keep(tmp_path, parts=(packed(5),))
    found = PackedCache(tmp_path, KEY).find()
    assert found

    with pytest.raises(Damaged, match="is not the one that was written"):
        found.runs(name, kind, rows, row_bytes)


def test_a_file_that_is_not_finished_is_not_found_and_leaves_nothing(tmp_path: Path) -> None:
    new = PackedCache(tmp_path, KEY).new_file()
    assert new
    new.add("m/0", "Q4_0", 2, 18)
    new.write("m/0", 0, packed(2))

    assert PackedCache(tmp_path, KEY).find() is None
    new.abandon()
    new.abandon()

    assert not list(tmp_path.iterdir())


def test_a_finished_file_is_not_abandoned(tmp_path: Path) -> None:
    new = PackedCache(tmp_path, KEY).new_file()
    assert new
    new.finish()
    new.abandon()

    assert PackedCache(tmp_path, KEY).find()


def test_two_loads_do_not_write_the_same_file(tmp_path: Path) -> None:
    first = PackedCache(tmp_path, KEY).new_file()
    assert first
    assert PackedCache(tmp_path, KEY).new_file() is None
    first.add("m/0", "Q4_0", 2, 18)
    first.write("m/0", 0, packed(2))

    first.finish()

    assert torch.equal(kept(tmp_path, 2), packed(2))


def test_what_a_dead_load_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / f"{KEY}.unfinished").write_bytes(b"x" * 1000)

    keep(tmp_path, parts=(packed(3),))

    assert torch.equal(kept(tmp_path, 3), packed(3))


def test_what_cannot_be_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)

    keep(tmp_path, parts=(packed(3),))

    assert not list(tmp_path.iterdir())
    assert "are not kept: [Errno 28] No space left" in caplog.text


def test_a_directory_that_cannot_be_made_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()

    assert PackedCache(tmp_path / "file" / "cache", KEY).new_file() is None
    assert "are not kept" in caplog.text


class Disk:
    """``os.statvfs`` of a disk with so much free."""

    f_frsize = 1

    def __init__(self, free_bytes: int) -> None:
        self.f_bavail = free_bytes


def sized(directory: Path, name: str, size: int, used_at: int) -> Path:
    path = directory / name
    path.write_bytes(bytes(size))
    os.utime(path, (used_at, used_at))
    return path


@pytest.mark.parametrize(
    ("nbytes", "is_kept", "left"),
    [
        (100, True, {"a", "b", "c"}),  # 300 + 100 of (300 + 500) / 2
        (101, True, {"a", "c"}),  # the one unused longest goes
        (200, True, {"a", "c"}),
        (201, True, {"a"}),
        (400, True, set()),
        (401, False, set()),
    ],
)
def test_the_files_take_half_of_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, is_kept: bool, left: set[str]
) -> None:
    for name, used_at in (("a", 3), ("b", 1), ("c", 2)):
        sized(tmp_path, f"{name}.packed", 100, used_at)
    sized(tmp_path, "notes.txt", 5000, 0)
    sized(tmp_path, f"{KEY}.packed", 5000, 0)  # this load's own, which is replaced
    monkeypatch.setattr(os, "statvfs", lambda _: Disk(500))

    assert PackedCache(tmp_path, KEY).make_room(nbytes) is is_kept

    mine = {f"{KEY}.packed", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} - mine == {f"{name}.packed" for name in left}


def test_being_used_keeps_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for used_at, key in enumerate((KEY, "newer")):
        keep(tmp_path, key, (packed(3),))
        os.utime(tmp_path / f"{key}.packed", (used_at, used_at))
    assert PackedCache(tmp_path, KEY).find()
    size = (tmp_path / "newer.packed").stat().st_size
    monkeypatch.setattr(os, "statvfs", lambda _: Disk(2 * size))

    assert PackedCache(tmp_path, "third").make_room(size)

    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.packed"]


def test_what_dead_loads_left_is_removed_and_what_is_written_is_not(tmp_path: Path) -> None:
    (tmp_path / "dead.unfinished").write_bytes(bytes(100))
    with (tmp_path / "live.unfinished").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert PackedCache(tmp_path, KEY).make_room(1)

        assert [path.name for path in tmp_path.iterdir()] == ["live.unfinished"]


def test_room_that_cannot_be_made_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not PackedCache(tmp_path / "nowhere", KEY).make_room(1)
    assert "are not kept" in caplog.text


def test_a_key_is_of_the_files_and_the_recipe(tmp_path: Path) -> None:
    path, link = tmp_path / "model", tmp_path / "link"
    path.write_bytes(b"12345678")
    os.utime(path, (1, 1))
    link.symlink_to(path)
    key = key_of([path, path], "Q4_0", 0)

    assert key_of([path], "Q4_0", 0) == key_of([link], "Q4_0", 0) == key
    assert key_of([path], "Q4_1", 0) != key
    assert key_of([path], "Q4_0", 1) != key
    os.utime(path, (1, 2))
    assert key_of([path], "Q4_0", 0) != key
    path.write_bytes(b"123456789")
    os.utime(path, (1, 1))
    assert key_of([path], "Q4_0", 0) != key


def test_a_key_of_a_file_that_is_gone_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: cannot be read"):
        key_of([tmp_path / "gone"])


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_a_new_file_counts_its_bytes(tmp_path: Path) -> None:
    new = NewFile.open(tmp_path / "x.packed")
    assert new
    new.add("a", "Q4_0", 5, 18)
    new.add("b", "Q4_0", 2, 36)

    assert new.nbytes == 5 * 18 + 2 * 36
    new.abandon()
