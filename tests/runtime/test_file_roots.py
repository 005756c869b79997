"""``file:`` reads below the configured roots and nowhere else, whatever the path looks like."""

from pathlib import Path

import pytest

from cortex.ipc.errors import ModelNotFound, Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.cached_models import CachedModels
from cortex.runtime.config import CacheConfig, NeuronConfig
from cortex.runtime.places import FileConfig, SourcesConfig
from cortex.runtime.preflight import check_request


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a model in it, beside a secret that is none of its business."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "m.gguf").write_bytes(b"GGUF")
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "models" / "m.gguf").write_bytes(b"GGUF")
    return tmp_path / "models"


def config(root: Path, listen: str = "0.0.0.0:1") -> NeuronConfig:
    """Return the configuration of a node that may read below *root*."""
    roots = SourcesConfig(file=FileConfig(roots=[str(root)]))
    return NeuronConfig(listen=listen, sources=roots, cache=CacheConfig(str(root / "none")))


def refusal(root: Path, path: str) -> str | None:
    """Return the kind of refusal that a load of *path* meets, None where it may be read."""
    try:
        check_request(LoadRequest(f"file:{path}"), config(root).places.roots)
    except Unloadable as exc:
        return str(exc.extras["kind"])
    return None


@pytest.mark.parametrize("path", ["m.gguf", "m", "m/../m.gguf", "not-there.gguf", "./m//"])
def test_what_lies_below_a_root_may_be_read(root: Path, path: str) -> None:
    assert refusal(root, f"{root}/{path}") is None


@pytest.mark.parametrize(
    "path", ["../secret/m.gguf", "m/../../secret/m.gguf", "..", "../models-2/m.gguf", "/etc/passwd"]
)
def test_what_lies_elsewhere_may_not(root: Path, path: str) -> None:
    assert refusal(root, f"{root}/{path}" if path[0] != "/" else path) == "path_not_allowed"


def test_a_link_out_of_a_root_leads_nowhere(root: Path) -> None:
    (root / "out.gguf").symlink_to(root.parent / "secret" / "m.gguf")
    (root / "outside").symlink_to(root.parent / "secret")

    assert refusal(root, f"{root}/out.gguf") == "path_not_allowed"
    assert refusal(root, f"{root}/outside") == "path_not_allowed"
    assert refusal(root, f"{root}/outside/m.gguf") == "path_not_allowed"


def test_a_link_in_a_model_s_directory_leads_nowhere_either(root: Path) -> None:
    (root / "m" / "tokenizer_config.json").symlink_to(root.parent / "secret" / "m.gguf")

    assert refusal(root, f"{root}/m") == "path_not_allowed"


def test_a_link_that_stays_below_a_root_may_be_read(root: Path) -> None:
    (root / "nick.gguf").symlink_to(root / "m.gguf")
    (root / "m" / "model.safetensors").symlink_to("../m.gguf")

    assert refusal(root, f"{root}/nick.gguf") is None
    assert refusal(root, f"{root}/m") is None


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)

    assert refusal(link, f"{link}/m.gguf") is None
    assert refusal(link, f"{root}/m.gguf") is None


def test_links_that_go_round_in_circles_are_no_way_out_and_no_crash(root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")

    assert refusal(root, f"{root}/a") is None  # below the root, and not there


@pytest.mark.parametrize("path", ["relative/m.gguf", "~/m.gguf", "", "/a\0b"])
def test_a_path_is_absolute_or_nothing(root: Path, path: str) -> None:
    assert refusal(root, path) == "source_unsupported"


@pytest.mark.parametrize(
    "model_id",
    ["../etc/passwd", "org/..", "huggingface:../..", "huggingface:/etc/passwd", "pypi:../x/m.gguf"],
)
def test_no_other_id_becomes_a_path(root: Path, model_id: str) -> None:
    with pytest.raises(Unloadable):
        check_request(LoadRequest(model_id), config(root).places.roots)


@pytest.mark.parametrize("ask", ["capabilities", "text_side"])
async def test_models_that_are_not_loaded_obey_too(root: Path, ask: str) -> None:
    cached = CachedModels(config(root).places)

    with pytest.raises(ModelNotFound, match="is not below a directory that file: may read"):
        await getattr(cached, ask)(f"file:{root.parent}/secret/m.gguf")


@pytest.mark.parametrize(
    ("listen", "roots"), [("127.0.0.1:1", None), ("[::1]:1", None), ("0.0.0.0:1", ())]
)
def test_without_roots_any_path_is_for_loopback_only(
    tmp_path: Path, listen: str, roots: tuple[Path, ...] | None
) -> None:
    unset = NeuronConfig(listen=listen, cache=CacheConfig(str(tmp_path)))

    assert unset.places.roots == roots


def test_roots_hold_on_loopback_as_well(root: Path) -> None:
    assert config(root, "127.0.0.1:1").places.roots == (root,)
