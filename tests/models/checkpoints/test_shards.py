"""Checkpoints in several safetensors files: whole, hub-shaped, damaged, and pointing elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.shards import INDEX
from tiny_models import Player, loaded, random_llama, reference_logits, some_tokens

NORM = "model.norm.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    random_llama().save_pretrained(directory, max_shard_size="100KB")
    return directory


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def change_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the index with its weight_map changed in place by *change*."""
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def file_of(directory: Path, tensor: str) -> Path:
    """Return the shard that holds *tensor*."""
    name = json.loads((directory / INDEX).read_text())["weight_map"][tensor]
    return directory / str(name)


def hub_snapshot(directory: Path, cache: Path) -> Path:
    """Lay *directory* out as a Hugging Face cache does: a snapshot of links to blobs."""
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_logits_from_several_files_are_those_of_transformers(sharded: Path) -> None:
    tokens = some_tokens(20)

    logits = Player(loaded(sharded)).step(a=tokens)["a"]

    assert len(shards(sharded)) > 3
    expected = reference_logits(random_llama(), tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_tensor_is_in_the_file_the_index_names(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)

    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert {name: t.path.name for name, t in checkpoint.tensors.items()} == weight_map
    for path in shards(sharded):
        for name, tensor in load_file(path).items():
            info = checkpoint.tensors[name]
            assert path.read_bytes()[info.offset :][: info.nbytes] == tensor.numpy().tobytes()


def test_loading_leaves_no_file_open(sharded: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())

    loaded(sharded)

    assert {fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()} <= before


def test_a_snapshot_of_a_hub_cache_is_read_through_its_links(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(sharded, tmp_path / "models--tiny")

    assert loaded(snapshot).caches.layers == 3


def test_a_snapshot_reached_through_a_link_is_read(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(sharded, tmp_path / "models--tiny")
    (tmp_path / "here").symlink_to(snapshot)

    assert loaded(tmp_path / "here").caches.layers == 3


def test_a_link_within_the_directory_is_followed(sharded: Path) -> None:
    first = shards(sharded)[0]
    first.rename(sharded / "stored")
    first.symlink_to("stored")

    assert loaded(sharded).caches.layers == 3


def test_the_single_file_is_preferred_as_transformers_does(sharded: Path) -> None:
    random_llama().save_pretrained(sharded.parent / "single")
    (sharded.parent / "single" / "model.safetensors").rename(sharded / "model.safetensors")

    paths = {tensor.path.name for tensor in Checkpoint.open(sharded).tensors.values()}

    assert paths == {"model.safetensors"}


def test_missing_shards_are_named(sharded: Path) -> None:
    first, _, third, *_ = shards(sharded)
    first.unlink()
    third.unlink()

    with pytest.raises(CheckpointError, match=f"not there: '{first.name}', '{third.name}'"):
        Checkpoint.open(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    second = shards(sharded)[1]
    os.truncate(second, second.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=rf"{second.name}: .*truncated or damaged"):
        Checkpoint.open(sharded)


def test_a_shard_that_goes_away_while_it_is_read_is_named(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, last = Checkpoint.open(sharded), shards(sharded)[-1]
    last.unlink()
    monkeypatch.setattr(Checkpoint, "open", lambda _: checkpoint)

    with pytest.raises(CheckpointError, match=f"{last.name}: cannot be read: No such file"):
        loaded(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        "a\0b",
        "a\nb",
        "a\u202eb",
    ],
)
def test_a_name_that_is_no_plain_one_is_refused(sharded: Path, name: str) -> None:
    change_index(sharded, lambda weight_map: weight_map.update({NORM: name}))

    with pytest.raises(CheckpointError, match="is no plain name of a file"):
        Checkpoint.open(sharded)


def test_a_name_too_long_for_a_file_is_refused(sharded: Path) -> None:
    change_index(sharded, lambda weight_map: weight_map.update({NORM: "a" * 5000}))

    with pytest.raises(CheckpointError, match=r"File name too long|not there"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_directory_is_refused(
    sharded: Path, tmp_path: Path, *, absolute: bool
) -> None:
    first = shards(sharded)[0]
    first.rename(tmp_path / "secret")
    first.symlink_to(tmp_path / "secret" if absolute else "../secret")

    with pytest.raises(CheckpointError, match="is a link that leaves its directory"):
        Checkpoint.open(sharded)


def test_a_link_to_blobs_is_followed_from_a_snapshot_only(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(sharded, tmp_path / "models--tiny")
    revisions = snapshot.parent.rename(snapshot.parent.parent / "revisions")

    with pytest.raises(CheckpointError, match="is a link that leaves its directory"):
        Checkpoint.open(revisions / snapshot.name)


def test_a_blob_that_is_a_link_to_elsewhere_is_refused(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(sharded, tmp_path / "models--tiny")
    blob = shards(snapshot)[0].resolve()
    blob.rename(tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")

    with pytest.raises(CheckpointError, match="is a link that leaves its directory"):
        Checkpoint.open(snapshot)


def test_a_link_to_itself_is_refused(sharded: Path) -> None:
    first = shards(sharded)[0]
    first.unlink()
    first.symlink_to(first.name)

    with pytest.raises(CheckpointError, match="not there"):
        Checkpoint.open(sharded)


def test_a_pipe_in_place_of_a_shard_is_refused_and_does_not_hang(sharded: Path) -> None:
    first = shards(sharded)[0]
    first.unlink()
    os.mkfifo(first)

    with pytest.raises(CheckpointError, match="is no regular file"):
        Checkpoint.open(sharded)


def test_a_directory_in_place_of_a_shard_is_refused(sharded: Path) -> None:
    first = shards(sharded)[0]
    first.unlink()
    first.mkdir()

    with pytest.raises(CheckpointError, match="is no regular file"):
        Checkpoint.open(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    elsewhere = shards(sharded)[0]
    change_index(sharded, lambda weight_map: weight_map.update({NORM: elsewhere.name}))

    with pytest.raises(CheckpointError, match=f"{elsewhere.name}: lacks .*here: '{NORM}'"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_files_is_named(sharded: Path) -> None:
    other = next(path for path in shards(sharded) if path != file_of(sharded, NORM))
    save_file({**load_file(other), NORM: torch.ones(64)}, other)

    with pytest.raises(CheckpointError, match=f"{other.name}: holds .*place here: '{NORM}'"):
        Checkpoint.open(sharded)


def test_a_tensor_that_the_index_does_not_know_is_named(sharded: Path) -> None:
    change_index(sharded, lambda weight_map: weight_map.pop(NORM))

    with pytest.raises(CheckpointError, match=f"does not place here: '{NORM}'"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"t": 7}}', "'t' lies in 7, which is no name"),
        ('{"weight_map": {"t": null}}', "'t' lies in None, which is no name"),
        ('{"weight_map": {"t": "a", "t": "b"}}', "has the key 't' twice"),
        ('{"weight_map": {"t": "\\ud800"}}', "not valid JSON"),
    ],
)
def test_a_damaged_index_is_refused_in_words(sharded: Path, content: str, says: str) -> None:
    (sharded / INDEX).write_text(content)

    with pytest.raises(CheckpointError, match=rf"{INDEX}.*{says}"):
        Checkpoint.open(sharded)
