"""Whatever a configuration says, the neuron reads it or names the place that is wrong."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.ipc.settings import ConfigError
from cortex.runtime import config as module
from cortex.runtime.config import NeuronConfig, load_config
from cortex.runtime.serving import CannotListen, bind
from toml_fuzz import files_for, variables_for

EXAMPLE = Path(__file__).resolve().parents[2] / "packaging" / "neuron.example.toml"
TRIES = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _no_file_in_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "DEFAULT_PATH", tmp_path / "none" / "neuron.toml")


def used(config: NeuronConfig) -> None:
    """Ask *config* for all that a start does with it before it opens a socket."""
    assert config.address
    assert "\0" not in f"{config.cache_directory}{config.tap_directory(1)}"


def check(path: Path, environment: dict[str, str]) -> None:
    """Read *path* and *environment*: the configuration can be used, or the place is named."""
    try:
        config = load_config(path, environment)
    except ConfigError as exc:
        places = [rf"{re.escape(str(path))}(:\d+)?: ", r"NEURON_\S*: ", "cannot read "]
        assert re.match("|".join(places), str(exc)), str(exc)  # noqa: PT017
    else:
        used(config)


@TRIES
@given(text=files_for(NeuronConfig))
def test_any_file_is_read_or_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text(text, encoding="utf-8")

    check(path, {})


@TRIES
@given(environment=variables_for(NeuronConfig, "NEURON_"))
def test_any_variable_is_read_or_refused_by_its_name(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text("[[models]]\nmodel_id = 'a'\n[admission]\n", encoding="utf-8")

    check(path, environment)


@TRIES
@given(data=st.data())
def test_an_example_with_a_piece_torn_out_is_read_or_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    text = re.sub(r"^# (?=\[|\w+ = )", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 40)))
    path = tmp_path / "neuron.toml"
    path.write_text(text[:begin] + text[end:], encoding="utf-8")

    check(path, {})


@TRIES
@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "neuron.toml"
    path.write_bytes(content)

    check(path, {})


@pytest.mark.parametrize("depth", [100, 5_000, 200_000])
@pytest.mark.parametrize("opening", ["[", "{a="])
def test_a_deeply_nested_file_is_refused(tmp_path: Path, opening: str, depth: int) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text("listen = " + opening * depth, encoding="utf-8")

    with pytest.raises(ConfigError, match=r"neuron\.toml(:1)?: not TOML: "):
        load_config(path, {})


@pytest.mark.parametrize("host", ["..", "x" * 70, "a..b", "\x7f", "ü" * 70])
def test_an_impossible_host_is_one_sentence(host: str) -> None:
    with pytest.raises(CannotListen, match="cannot listen on "):
        bind(host, 1)


@pytest.mark.parametrize("table", ["cache", "taps"])
@pytest.mark.parametrize("directory", ["~nobody-here/x", "/a\\u0000b"])
def test_a_directory_that_cannot_be_is_named(tmp_path: Path, table: str, directory: str) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text(f'[{table}]\ndirectory = "{directory}"', encoding="utf-8")

    with pytest.raises(ConfigError, match=rf"neuron\.toml:2: {table}\.directory: "):
        load_config(path, {})
