"""Where models may come from: the file first, then what the Hugging Face tools go by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cortex.ipc.settings import ConfigError
from cortex.runtime import config as config_module
from cortex.runtime.config import NeuronConfig, load_config
from cortex.runtime.places import Places, SourcesConfig, places_of


def places(
    environment: Mapping[str, str] = {},
    *,
    is_loopback: bool = True,
    cache: Path = Path("/c"),
    **tables: Any,
) -> Places:
    """Return the places of a neuron with these tables below [sources]."""
    config = msgspec.convert(tables, SourcesConfig)
    home = {"HF_HOME": "/nowhere", **environment}
    return places_of(config, home, cache=cache, is_loopback=is_loopback)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("hf_from_file\n")
    path.chmod(0o600)
    return path


def test_without_options_it_is_the_public_hub_without_a_token() -> None:
    hub = places().hub

    assert (hub.access.endpoint, hub.access.token) == ("https://huggingface.co", None)
    assert (hub.is_offline, hub.access.parallel_files) == (False, 4)
    assert hub.cache == Path("/nowhere/hub")


def test_the_environment_names_hub_token_and_cache() -> None:
    hub = places(
        {
            "HF_ENDPOINT": "http://mirror:8080/",
            "HF_TOKEN": " hf_abc ",
            "HF_HUB_CACHE": "/models",
            "HF_HUB_OFFLINE": "true",
        }
    ).hub

    assert (hub.access.endpoint, hub.access.token) == ("http://mirror:8080", "hf_abc")
    assert (hub.cache, hub.is_offline) == (Path("/models"), True)


def test_the_file_wins_over_the_environment(token_file: Path) -> None:
    hub = places(
        {"HF_ENDPOINT": "http://mirror:8080", "HF_TOKEN": "hf_abc"},
        huggingface={
            "endpoint": "https://hub.example/hf/",
            "token_file": str(token_file),
            "parallel_files": 2,
            "offline": True,
        },
    ).hub

    assert hub.access.endpoint == "https://hub.example/hf"
    assert (hub.access.token, hub.access.parallel_files) == ("hf_from_file", 2)
    assert hub.is_offline


def test_whoever_has_logged_in_needs_no_option(tmp_path: Path, token_file: Path) -> None:
    assert places({"HF_HOME": str(tmp_path)}).hub.access.token == "hf_from_file"
    assert places({"HF_TOKEN_PATH": str(token_file)}).hub.access.token == "hf_from_file"


@pytest.mark.parametrize("value", ["0", "", "no"])
def test_offline_is_not_meant_by_every_value(value: str) -> None:
    assert places({"HF_HUB_OFFLINE": value}).hub.is_offline is False


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_ENDPOINT": "huggingface.co"}, "HF_ENDPOINT: 'huggingface.co'"),
        ({"HF_ENDPOINT": "http://user:secret@hub"}, "HF_ENDPOINT"),
        ({"HF_TOKEN": "two words"}, "HF_TOKEN: it is not printable"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        places(environment)


def test_a_token_that_everybody_can_read_is_refused(token_file: Path) -> None:
    token_file.chmod(0o644)

    with pytest.raises(ConfigError, match=r"sources\.huggingface\.token_file: .* holds a secret"):
        places(huggingface={"token_file": str(token_file)})


@pytest.mark.parametrize(
    ("tables", "is_loopback", "roots"),
    [
        ({}, True, None),
        ({}, False, ()),
        ({"file": {"roots": ["/a", "/b"]}}, True, (Path("/a"), Path("/b"))),
        ({"file": {"roots": ["/a"]}}, False, (Path("/a"),)),
        ({"file": {"roots": []}}, True, ()),
    ],
)
def test_files_may_be_read_below_the_roots_or_anywhere_on_loopback(
    tables: dict[str, Any], is_loopback: bool, roots: object
) -> None:
    assert places(is_loopback=is_loopback, **tables).roots == roots


def test_an_index_of_packages_is_pips() -> None:
    assert places().pip_options == ()
    assert places(pypi={"index_url": "https://pypi.example/simple"}).pip_options == (
        "--index-url",
        "https://pypi.example/simple",
    )


def test_without_a_home_the_hubs_cache_is_beside_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)

    hub = places_of(SourcesConfig(), {}, cache=Path("/c"), is_loopback=True).hub

    assert (hub.cache, hub.access.token) == (Path("/c/hub"), None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[sources.huggingface]\nendpoint = "hub"', ":2: sources.huggingface.endpoint: expected"),
        ("[sources.huggingface]\nparallel_files = 0", ":2: sources.huggingface.parallel_files: "),
        ('[sources.file]\nroots = ["models"]', "sources.file.roots[0]: expected an absolute path"),
        ("[sources.modelscope]", ":1: sources.modelscope: "),
    ],
)
def test_a_wrong_option_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text(text)

    with pytest.raises(ConfigError) as refused:
        load_config(path, {})

    assert words in str(refused.value)


def test_roots_in_the_environment_are_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config_module, "DEFAULT_PATH", tmp_path / "none.toml")

    config = load_config(None, {"NEURON_SOURCES__FILE__ROOTS": "/a, /b"})

    assert config.places.roots == (Path("/a"), Path("/b"))


def test_a_neuron_beyond_loopback_reads_no_files() -> None:
    assert NeuronConfig(listen="0.0.0.0:1").places.roots == ()
