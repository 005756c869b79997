"""Footprints are kept from run to run, and a damaged file costs nothing but them."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.footprints import FILE, Footprints

HELD = Footprint(100, 20, 3)


def kept(directory: Path) -> Footprints:
    """Return the footprints in *directory*, where one of cpu:0 has been saved."""
    footprints = Footprints(directory)
    footprints.keep(LoadRequest("org/m", quant="q4_1"), "cpu:0", HELD)
    footprints.save()
    return Footprints(directory)


def test_what_was_measured_is_known_to_the_next_run(tmp_path: Path) -> None:
    assert kept(tmp_path / "cache").of(LoadRequest("org/m", quant="Q4_1"), "cpu:1") == HELD


@pytest.mark.parametrize(
    ("changed", "device"),
    [
        ({"quant": "Q8_0"}, "cpu:0"),
        ({"quant": "q4_1", "dtype": "float32"}, "cpu:0"),
        ({"quant": "q4_1", "max_context_tokens": 512}, "cpu:0"),
        ({"quant": "q4_1", "max_sequences": 2}, "cpu:0"),
        ({"quant": "q4_1", "kv_cache_mb": 9}, "cpu:0"),
        ({"quant": "q4_1"}, "cuda:0"),
    ],
)
def test_it_is_that_of_nothing_else(tmp_path: Path, changed: dict[str, Any], device: str) -> None:
    assert kept(tmp_path).of(LoadRequest("org/m", **changed), device) is None


def test_the_same_again_is_no_news(tmp_path: Path) -> None:
    footprints, request = kept(tmp_path), LoadRequest("org/m", quant="Q4_1")

    assert not footprints.keep(request, "cpu:1", HELD)
    assert footprints.keep(request, "cpu:1", Footprint(1, 2, 3))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version":1,"measured":[{"model":1}]}'])
def test_a_damaged_file_is_said_and_replaced(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE).write_bytes(damage)
    with capture_logs() as log:
        footprints = kept(tmp_path)

    assert [line["event"] for line in log] == ["kept footprints not read"]
    assert footprints.of(LoadRequest("org/m", quant="q4_1"), "cpu:0") == HELD


def test_what_several_devices_share_is_another_footprint() -> None:
    footprints = Footprints(None)
    footprints.keep(LoadRequest("m", tensor_parallel=2), "cpu:0", HELD)

    assert footprints.of(LoadRequest("m", devices=[2, 3]), "cpu:2") == HELD
    assert footprints.of(LoadRequest("m"), "cpu:0") is None
    assert footprints.of(LoadRequest("m", tensor_parallel=4), "cpu:0") is None


def test_a_file_of_another_version_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / FILE
    kept(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"version": 2', b'"version": 1'))

    assert Footprints(tmp_path).of(LoadRequest("org/m", quant="q4_1"), "cpu:0") is None


def test_a_directory_that_cannot_be_written_is_a_line_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    footprints = Footprints(tmp_path / "file")
    footprints.keep(LoadRequest("org/m"), "cpu:0", HELD)
    with capture_logs() as log:
        footprints.save()

    assert "footprints not kept" in [line["event"] for line in log]


def test_a_rename_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with capture_logs():
        kept(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_without_a_directory_they_are_kept_for_this_run() -> None:
    footprints = Footprints(None)
    footprints.keep(LoadRequest("org/m"), "cpu:0", HELD)
    footprints.save()

    assert footprints.of(LoadRequest("org/m"), "cpu:0") == HELD
