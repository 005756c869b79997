"""Whatever ``cortex.toml`` and ``models.toml`` say, it is read, or refused with its place."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from cortex.gateway.app import CannotListen, Gateway
from cortex.gateway.catalogue import ModelsFile, catalogue_for, load_catalogue
from cortex.gateway.config import GatewayConfig, Listening, load_config
from cortex.ipc.settings import ConfigError
from toml_fuzz import files_for, variables_for

NEURON = "[[neurons]]\nname = 'a'\nendpoint = 'http://a:1'\n"
TRIES = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(path: Path, environment: dict[str, str]) -> None:
    """Read *path* and *environment*: either it works, or the place that is wrong is named."""
    try:
        config, origin = load_config(path, environment)
        catalogue_for(config.models_config, origin, [neuron.name for neuron in config.neurons])
    except ConfigError as exc:
        words = ["no neuron is configured", "cannot read "]
        places = [rf"{re.escape(str(path))}(:\d+)?: ", r"CORTEX_\S*: "]
        assert re.match("|".join(words + places), str(exc)), str(exc)  # noqa: PT017


@TRIES
@given(text=files_for(GatewayConfig))
def test_any_file_is_read_or_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(f"{text}\n{NEURON}", encoding="utf-8")

    check(path, {})


@TRIES
@given(environment=variables_for(GatewayConfig, "CORTEX_"))
def test_any_variable_is_read_or_refused_by_its_name(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(NEURON, encoding="utf-8")

    check(path, environment)


@TRIES
@given(text=files_for(ModelsFile))
def test_any_catalogue_is_read_or_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text, encoding="utf-8")

    try:
        load_catalogue(path, ["a"])
    except ConfigError as exc:
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", str(exc)), str(exc)  # noqa: PT017


@pytest.mark.parametrize("host", ["..", "x" * 70])
async def test_an_impossible_host_is_one_sentence(host: str) -> None:
    config = GatewayConfig(gateway=Listening(f"{host}:1", "127.0.0.1:0"))

    with pytest.raises(CannotListen, match="cannot listen on "):
        await Gateway(config).__aenter__()
