"""What the gateway says about its configuration."""

from pathlib import Path

import msgspec
import pytest

from cortex.gateway.catalogue import ModelsFile
from cortex.gateway.config import (
    Anthropic,
    Entitlements,
    GatewayConfig,
    Key,
    Listening,
    Neuron,
    Timeouts,
    load_config,
)
from cortex.ipc.settings import ConfigError, Table

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
NEURONS = '[[neurons]]\nname = "a"\nendpoint = "http://a:13131/"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "cortex.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, **environ: str) -> str:
    """Return what is said about *text*, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text), environ)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_example_equals_the_defaults() -> None:
    config, _ = load_config(PACKAGING / "cortex.example.toml", {})

    assert msgspec.structs.replace(config, neurons=()) == GatewayConfig()


@pytest.mark.parametrize(
    "shape",
    [GatewayConfig, Listening, Neuron, Anthropic, Entitlements, Key, Timeouts],
    ids=lambda shape: shape.__name__,
)
def test_every_option_is_in_the_example(shape: type[Table]) -> None:
    text = (PACKAGING / "cortex.example.toml").read_text(encoding="utf-8")

    assert [name for name in shape.__struct_fields__ if name not in text] == []


def test_an_endpoint_loses_its_trailing_slash(tmp_path: Path) -> None:
    config, _ = load_config(written(tmp_path, NEURONS), {})

    assert config.neurons[0].url == "http://a:13131"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[eviction]\n", "cortex.toml:1: eviction: not supported by this version"),
        ('[[neurons]]\nname = "a b"\n', "cortex.toml:2: neurons[0].name: expected a name"),
        (
            NEURONS + '[[neurons]]\nname = "b"\nendpoint = "http://b/v1"\n',
            "cortex.toml:6: neurons[1].endpoint: expected http://HOST:PORT",
        ),
        (NEURONS + 'key_file = "x"\n', "cortex.toml:4: neurons[0].key_file: expected an absolute"),
        (NEURONS + 'ca_file = "/x"\n', "cortex.toml:4: neurons[0].ca_file: it has no meaning for"),
        ('[gateway]\nlisten = "localhost"\n', "cortex.toml:2: gateway.listen: expected HOST:PORT"),
        ("[timeouts]\npoll_seconds = 0\n", "cortex.toml:2: timeouts.poll_seconds: expected"),
    ],
)
def test_a_wrong_option_is_named_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "needs at least one [[neurons]]"),
        (NEURONS + NEURONS, "cortex.toml:5: neurons[1].name: 'a' is there twice"),
        (
            NEURONS + NEURONS.replace('"a"', '"b"'),
            "neurons[1].endpoint: 'http://a:13131' is there twice",
        ),
        (
            NEURONS + "[entitlements]\nrequire_auth = true\n",
            "require_auth: there must be at least one key",
        ),
        (
            NEURONS + '[[entitlements.keys]]\nkey = "12345678"\nid = "x"\n' * 2,
            "entitlements.keys[1].id: 'x' is there twice",
        ),
        (
            NEURONS
            + '[[entitlements.keys]]\nkey = "12345678"\nid = "x"\n'
            + '[[entitlements.keys]]\nkey = "12345678"\nid = "y"\n',
            "cortex.toml:8: entitlements.keys[1].key: is there twice",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[gateway]\nlisten = "127.0.0.1:1"\n' + NEURONS)
    environ = {"CORTEX_GATEWAY__LISTEN": "0.0.0.0:2", "CORTEX_TIMEOUTS__POLL_SECONDS": "7"}

    config, _ = load_config(path, environ)

    assert (config.gateway.listen, config.timeouts.poll_seconds) == ("0.0.0.0:2", 7.0)


def test_the_environment_may_name_a_whole_fleet() -> None:
    environ = {
        "CORTEX_NEURONS__0__NAME": "a",
        "CORTEX_NEURONS__0__ENDPOINT": "http://a:1",
        "CORTEX_NEURONS__1__NAME": "b",
        "CORTEX_NEURONS__1__ENDPOINT": "http://b:1",
        "CORTEX_ENTITLEMENTS__REQUIRE_AUTH": "false",
    }

    config, _ = load_config(None, environ)

    assert [neuron.name for neuron in config.neurons] == ["a", "b"]


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("CORTEX_GATEWAY__LISTN", "CORTEX_GATEWAY__LISTN: unknown option"),
        ("CORTEX_TIMEOUTS__POLL_SECONDS", "CORTEX_TIMEOUTS__POLL_SECONDS: expected `float`"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, said: str) -> None:
    assert refusal(tmp_path, NEURONS, **{variable: "x"}).startswith(said)


def test_the_key_of_the_client_commands_is_no_option(tmp_path: Path) -> None:
    config, _ = load_config(written(tmp_path, NEURONS), {"CORTEX_API_KEY": "sk-x", "HOME": "/"})

    assert config.neurons


def test_the_example_catalogue_has_every_option() -> None:
    text = (PACKAGING / "models.example.toml").read_text(encoding="utf-8")
    profile = msgspec.toml.decode(text, type=ModelsFile).models[0]

    assert None not in msgspec.structs.astuple(profile)
