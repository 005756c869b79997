"""The files of a load: found, judged, read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.model_files import ModelFiles

PLENTY = 2**33


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ModelFiles]:
    files = ModelFiles(tmp_path / "cache", [tmp_path, Path("/")])
    yield files
    files.close()


def _ignore(_done: int, _total: int) -> None:
    pass


def test_a_file_outside_the_roots_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, [tmp_path])

    with pytest.raises(Unloadable) as refused:
        files.refuse(LoadRequest("file:/etc/passwd"))
    assert refused.value.kind == "path_not_allowed"


async def test_a_local_file_is_where_it_is(files: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()

    assert await files.fetch(LoadRequest(f"file:{path}"), _ignore) == path


async def test_a_file_that_is_no_checkpoint_is_unloadable(
    files: ModelFiles, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")

    with pytest.raises(Unloadable) as refused:
        await files.read(path, LoadRequest(f"file:{path}"), PLENTY)
    assert refused.value.kind == "corrupt_checkpoint"


async def test_a_model_that_fits_has_a_text_side(files: ModelFiles, embedded_model: Path) -> None:
    text = await files.read(embedded_model, LoadRequest(f"file:{embedded_model}"), PLENTY)

    assert text.text_prompt("Paris")


async def test_a_model_is_judged_by_the_memory_that_is_free(
    files: ModelFiles, embedded_model: Path
) -> None:
    with pytest.raises(Unloadable) as refused:
        await files.read(embedded_model, LoadRequest(f"file:{embedded_model}"), 2**20)

    assert refused.value.kind == "insufficient_memory"
