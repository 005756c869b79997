"""What the gateway says about its configuration."""

from pathlib import Path

import msgspec
import pytest
from structlog.typing import EventDict

from cortex.gateway import config as config_module
from cortex.gateway.catalogue import ModelsFile
from cortex.gateway.config import (
    Budget,
    Engine,
    Entitlements,
    Eviction,
    GatewayConfig,
    Key,
    Neuron,
    Responses,
    Routing,
    State,
    Timeouts,
    load_config,
)
from cortex.ipc.settings import ConfigError, Table

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
TABLES = [kind for kind in vars(config_module).values() if kind in Table.__subclasses__()]
NEURONS = '[[neurons]]\nname = "a"\nendpoint = "http://a:13131/"\n'
ENGINE = '[[engines]]\nname = "ray"\nendpoint = "http://ray:8000"\n'
KEY = '[[entitlements.keys]]\nkey = "12345678"\nid = "x"\n'


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


@pytest.mark.parametrize("shape", [*TABLES, Engine], ids=lambda shape: shape.__name__)
def test_every_option_is_in_the_example(shape: type[Table]) -> None:
    text = (PACKAGING / "cortex.example.toml").read_text(encoding="utf-8")

    assert [name for name in shape.__struct_fields__ if name not in text] == []


def test_an_endpoint_loses_its_trailing_slash(tmp_path: Path) -> None:
    config, _ = load_config(written(tmp_path, NEURONS), {})

    assert config.neurons[0].url == "http://a:13131"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[neurons]]\nname = "a b"\n', "cortex.toml:2: neurons[0].name: expected a name"),
        (
            NEURONS + '[[neurons]]\nname = "b"\nendpoint = "http://b/v1"\n',
            "cortex.toml:6: neurons[1].endpoint: expected http://HOST:PORT",
        ),
        (
            '[[neurons]]\nname = "a"\nendpoint = "http://me:secret@a:13131"\n',
            "cortex.toml:3: neurons[0].endpoint: expected http://HOST:PORT",
        ),
        (
            'models_config = "a\\u0000b"\n' + NEURONS,
            "cortex.toml:1: models_config: expected the path of a file",
        ),
        (NEURONS + 'key_file = "x"\n', "cortex.toml:4: neurons[0].key_file: expected an absolute"),
        (NEURONS + 'ca_file = "/x"\n', "cortex.toml:4: neurons[0].ca_file: it has no meaning for"),
        ('[gateway]\nlisten = "localhost"\n', "cortex.toml:2: gateway.listen: expected HOST:PORT"),
        ("[timeouts]\npoll_seconds = 0\n", "cortex.toml:2: timeouts.poll_seconds: expected"),
        ("[timeouts]\npoll_seconds = inf\n", "cortex.toml:2: timeouts.poll_seconds: expected"),
        ("[timeouts]\npoll_seconds = nan\n", "cortex.toml:2: timeouts.poll_seconds: expected"),
        (
            '[eviction]\nstrategy = "mru"\n',
            "cortex.toml:2: eviction.strategy: expected one of",
        ),
        ("[routing]\naffinity_load_factor = 0.5\n", "cortex.toml:2: routing.affinity_load_factor"),
        ('[state]\ndirectory = "here"\n', "cortex.toml:2: state.directory: expected an absolute"),
        (
            ENGINE.replace("8000", "8000/v1"),
            "cortex.toml:3: engines[0].endpoint: expected http://HOST:PORT",
        ),
        (ENGINE + "models = []\n", "cortex.toml:4: engines[0].models: expected"),
        (
            NEURONS + "max_in_flight = 3\n",
            "cortex.toml:4: neurons[0].max_in_flight: unknown option",
        ),
        (
            KEY + "budget = { tokens = 5, window = 3 }\n",
            "cortex.toml:4: entitlements.keys[0].budget.window: unknown option",
        ),
        (
            KEY + "budget = { per_seconds = 5 }\n",
            "cortex.toml:4: entitlements.keys[0].budget: ",
        ),
        (
            KEY.replace("12345678", "1234 5678 "),
            "cortex.toml:2: entitlements.keys[0].key: expected at least 8 printable ASCII",
        ),
        (KEY + "priority = 11\n", "cortex.toml:4: entitlements.keys[0].priority: expected"),
    ],
)
def test_a_wrong_option_is_named_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://:80",
        "http://[::1",
        "http://[not-one]:80",
        "http://a:99999",
        "http://a:http",
        r"http://a\\b",
    ],
)
def test_an_endpoint_that_nobody_could_connect_to_is_refused(tmp_path: Path, endpoint: str) -> None:
    said = refusal(tmp_path, f'[[neurons]]\nname = "a"\nendpoint = "{endpoint}"\n')

    assert said.startswith("cortex.toml:3: neurons[0].endpoint: ")


@pytest.mark.parametrize(
    "endpoint", ["http://a", "http://a:1/", "https://10.0.0.1:13131", "http://[::1]:80"]
)
def test_an_endpoint_is_a_name_or_an_address_and_perhaps_a_port(
    tmp_path: Path, endpoint: str
) -> None:
    path = written(tmp_path, f'[[neurons]]\nname = "a"\nendpoint = "{endpoint}"\n')

    config, _ = load_config(path, {})

    assert config.neurons[0].url == endpoint.rstrip("/")


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
            NEURONS + ENGINE.replace("ray", "a", 1),
            "cortex.toml:5: engines[0].name: 'a' is there twice",
        ),
        (
            NEURONS + ENGINE.replace("ray:8000", "a:13131"),
            "cortex.toml:6: engines[0].endpoint: 'http://a:13131' is there twice",
        ),
        (NEURONS + ENGINE + 'ca_file = "/x"\n', "engines[0].ca_file: it has no meaning for"),
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


def test_a_fleet_may_be_of_engines_alone(tmp_path: Path) -> None:
    config, _ = load_config(written(tmp_path, ENGINE), {})

    assert [node.name for node in config.nodes] == ["ray"]


def test_every_table_can_be_changed_by_the_environment(tmp_path: Path) -> None:
    environ = {
        "CORTEX_ENGINES__0__NAME": "ray",
        "CORTEX_ENGINES__0__ENDPOINT": "http://ray:8000",
        "CORTEX_ENGINES__0__MODELS__0": "glm-5",
        "CORTEX_ENGINES__0__MAX_IN_FLIGHT": "64",
        "CORTEX_EVICTION__STRATEGY": "priority",
        "CORTEX_ROUTING__BREAKER_FAILURES": "9",
        "CORTEX_STATE__DIRECTORY": "/srv/state",
        "CORTEX_RESPONSES__MAX_STORED": "0",
        "CORTEX_TIMEOUTS__LOAD_WAIT_SECONDS": "1.5",
        "CORTEX_ENTITLEMENTS__KEYS__0__KEY": "12345678",
        "CORTEX_ENTITLEMENTS__KEYS__0__ID": "x",
        "CORTEX_ENTITLEMENTS__KEYS__0__BUDGET__TOKENS": "5",
        "CORTEX_ENTITLEMENTS__KEYS__0__PRIORITY": "-1",
    }

    config, _ = load_config(written(tmp_path, NEURONS), environ)

    assert config == GatewayConfig(
        neurons=(Neuron("a", "http://a:13131/"),),
        engines=(Engine("ray", "http://ray:8000", models=("glm-5",), max_in_flight=64),),
        eviction=Eviction("priority"),
        routing=Routing(breaker_failures=9),
        state=State("/srv/state"),
        responses=Responses(max_stored=0),
        timeouts=Timeouts(load_wait_seconds=1.5),
        entitlements=Entitlements(keys=(Key("12345678", "x", budget=Budget(5), priority=-1),)),
    )


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


@pytest.mark.parametrize(("mode", "warnings"), [(0o644, 1), (0o640, 0)])
def test_keys_in_a_file_that_anybody_may_read_are_warned_of(
    tmp_path: Path, logged: list[EventDict], mode: int, warnings: int
) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(NEURONS + '[[entitlements.keys]]\nkey = "sk-a-secret"\nid = "me"\n')
    path.chmod(mode)

    load_config(path, {})

    said = [entry for entry in logged if entry["event"] == "anybody on this host can read the keys"]
    assert len(said) == warnings
