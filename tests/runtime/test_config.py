"""The neuron's configuration: defaults, files, the environment, and what is refused in words."""

import re
from pathlib import Path

import msgspec
import pytest

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.node_api import LoadRequest, SamplingDefaults
from cortex.ipc.settings import ConfigError
from cortex.runtime import config as module
from cortex.runtime.config import (
    AdmissionConfig,
    DeviceConfig,
    NeuronConfig,
    cuda_visible_devices,
    load_config,
    ordered_faults,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "packaging" / "neuron.example.toml"


@pytest.fixture(autouse=True)
def _no_file_in_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "DEFAULT_PATH", tmp_path / "none" / "neuron.toml")


def written(tmp_path: Path, text: str) -> Path:
    """Return a file that holds *text*."""
    path = tmp_path / "neuron.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, environment: dict[str, str] | None = None) -> str:
    """Return in which words the configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, environment or {})
    return str(caught.value)


def test_without_a_file_the_defaults_serve() -> None:
    assert load_config(None, {}) == NeuronConfig()


def test_a_file_in_the_default_place_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "DEFAULT_PATH", written(tmp_path, 'log_level = "debug"'))

    assert load_config(None, {}).log_level == "debug"


def test_every_section_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        listen = "[::1]:8000"
        [[devices]]
        name = "cpu:0"
        memory_mb = 512
        [[models]]
        model_id = "smollm2-135m-instruct"
        sampling = { temperature = 0.5 }
        [admission]
        max_in_flight = 2
        """,
    )

    config = load_config(path, {})

    assert config.address == ("::1", 8000)
    assert config.devices == [DeviceConfig("cpu:0", 512)]
    assert config.models == [LoadRequest("smollm2-135m-instruct", sampling=SamplingDefaults(0.5))]
    assert config.admission == AdmissionConfig(max_in_flight=2)


@pytest.mark.parametrize(
    ("text", "place", "line"),
    [
        ("listen = 5", "listen", 1),
        ('\nlog_level = "loud"', "log_level", 2),
        ("[admission]\nmax_queue_depth = 1\nmax_in_flight = 0", "admission.max_in_flight", 3),
        ("[admission]\n\nmax_wait = 1", "admission.max_wait", 3),
        ('[[devices]]\nname = "cpu:0"\n[[devices]]\nname = "tpu:0"', "devices[1].name", 4),
        ("[[models]]\nquant = 'q4_1'", "models[0]", 1),
        ("[auth]\nkeys = []", "auth.keys", 2),
        ('[auth]\nkey_file = "keys"', "auth.key_file", 2),
        ('[tls]\nkey_file = "/k"', "tls", 1),
        ("[engines]", "engines", 1),
        ('[engine]\nattention = "flash"', "engine.attention", 2),
        ("[sources.modelscope]", "sources.modelscope", 1),
    ],
)
def test_a_wrong_key_or_type_is_named_with_its_line(
    tmp_path: Path, text: str, place: str, line: int
) -> None:
    message = refusal(written(tmp_path, text))

    assert f"neuron.toml:{line}: {place}: " in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('listen = "13131"', "neuron.toml:1: listen: expected HOST:PORT"),
        ("devices = []", "neuron.toml:1: devices: it is empty"),
        (
            '[[devices]]\nname = "cpu:0"\n[[devices]]\nname = "cpu:0"',
            "neuron.toml:4: devices[1].name: 'cpu:0' is there twice",
        ),
        (
            '[[models]]\nmodel_id = "a"\n[[models]]\nmodel_id = "a"',
            "neuron.toml:4: models[1].model_id: 'a' is there twice",
        ),
        (
            '[[models]]\nmodel_id = "a"\nwait = true',
            "neuron.toml:3: models[0].wait: it has no meaning",
        ),
        (
            '[[models]]\nmodel_id = "a"\nsampling = { top_q = 1 }',
            "neuron.toml:3: models[0].sampling.top_q: unknown option",
        ),
        (
            '[[models]]\nmodel_id = "a"\nsampling = { top_p = 7 }',
            "models[0].sampling.top_p: expected `float` <= 1.0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(written(tmp_path, text))


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'listen = "a:1"\n[admission]\nmax_in_flight = 2')
    environment = {
        "NEURON_LISTEN": "b:2",
        "NEURON_ADMISSION__MAX_IN_FLIGHT": "3",
        "NEURON_TAPS__ENABLED": "false",
        "NEURON_DEVICES": "cpu:0, cpu:1",
        "NEURON_MODELS": "a,b",
    }

    config = load_config(path, environment)

    assert (config.listen, config.admission.max_in_flight) == ("b:2", 3)
    assert config.taps.enabled is False
    assert config.devices == [DeviceConfig("cpu:0"), DeviceConfig("cpu:1")]
    assert [model.model_id for model in config.models] == ["a", "b"]


def test_the_command_line_wins_over_the_environment() -> None:
    config = load_config(None, {"NEURON_LISTEN": "b:2"}, listen="c:3", log_level=None)

    assert (config.listen, config.log_level) == ("c:3", "info")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("NEURON_LISTNE", "a:1", "unknown option; did you mean listen?"),
        ("NEURON_ADMISSION__SEATS", "1", "unknown option"),
        ("NEURON_ADMISSION__MAX_IN_FLIGHT", "many", "expected `int`"),
        ("NEURON_DEVICES", "0,1", "devices[0].name: expected cpu:N or cuda:N"),
        ("NEURON_MODELS", "a,a", "models[1].model_id: 'a' is there twice"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, words: str) -> None:
    message = refusal(None, {name: value})

    assert name in message
    assert words in message


def test_variables_of_the_validation_script_and_of_others_are_not_ours() -> None:
    environment = {"NEURON_PORT": "1", "NEURON_LOAD_TIMEOUT": "9", "HOME": "/root"}

    assert load_config(None, environment) == NeuronConfig()


def test_the_switch_for_faults_is_for_tests_and_no_option() -> None:
    environment = {"NEURON_TEST_FAULTS": "forward:nan@2"}

    assert load_config(None, environment) == NeuronConfig()
    assert ordered_faults(environment) == "forward:nan@2"
    assert ordered_faults({}) == ""


def test_a_fault_that_is_misspelled_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="NEURON_TEST_FAULTS: 'rain' is no fault"):
        ordered_faults({"NEURON_TEST_FAULTS": "rain"})


def test_the_example_shows_every_option_and_its_default() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    shown = set(re.findall(r"^#? ?(\w+) = ", text, re.MULTILINE))

    assert load_config(EXAMPLE, {}) == NeuronConfig()
    assert shown == names_of(NeuronConfig) | names_of(DeviceConfig) | (
        names_of(LoadRequest) - {"wait"}
    )


def test_the_example_serves_with_everything_uncommented(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    options = [re.sub(r"^# (?=\[|\w+ = )", "", line) for line in lines]
    kept = [line for line in options if not line.startswith("devices = ")]

    config = load_config(written(tmp_path, "\n".join(kept)), {})

    assert config.devices != "auto"
    assert config.models[0].quant == "Q4_1"


def names_of(struct: type[msgspec.Struct]) -> set[str]:
    """Return the options of *struct* and its sections that are plain values."""
    names: set[str] = set()
    for field in msgspec.structs.fields(struct):
        kind = field.type
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            names |= names_of(kind)
        elif field.name != "models":  # shown as a table
            names.add(field.name)
    return names


def test_what_the_engines_are_told_is_in_their_section(tmp_path: Path) -> None:
    text = """
        [engine]
        prefix_cache = false
        speculation = false
        batch_invariant = true
        attention = "triton"
        cuda_graphs = false
        """

    told = load_config(written(tmp_path, text), {"NEURON_ENGINE__SPECULATION": "true"})

    assert told.engine.options == EngineOptions(
        batch_invariant=True,
        attention="triton",
        cuda_graphs=False,
        speculation=True,
        prefix_cache=False,
    )
    assert NeuronConfig().engine.options == EngineOptions()


@pytest.mark.parametrize(
    ("listen", "is_loopback"),
    [("127.0.0.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("0.0.0.0:1", False)],
)
def test_loopback_is_known(listen: str, is_loopback: bool) -> None:
    assert NeuronConfig(listen=listen).is_loopback is is_loopback


def test_directories_are_where_they_were_set(tmp_path: Path) -> None:
    text = f'[cache]\ndirectory = "{tmp_path}/c"\n[taps]\ndirectory = "{tmp_path}/t"'

    config = load_config(written(tmp_path, text), {})

    assert config.cache_directory == tmp_path / "c"
    assert config.tap_directory(13131) == tmp_path / "t"


def test_two_neurons_have_two_tap_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(module, "SERVICE_DIRECTORY", Path("/nonexistent"))

    config = NeuronConfig()

    assert config.tap_directory(1) == Path("/run/user/1000/neuron/taps-1")
    assert config.tap_directory(2) != config.tap_directory(1)


def test_the_services_own_directory_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "SERVICE_DIRECTORY", tmp_path)

    assert NeuronConfig().tap_directory(1) == tmp_path / "taps-1"


def test_without_any_home_the_cache_directory_has_to_be_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(module, "default_cache", homeless)

    assert "set directory in [cache]" in refusal(None)


def test_gpus_may_be_hidden_from_cuda() -> None:
    assert cuda_visible_devices({"CUDA_VISIBLE_DEVICES": "1"}) == "1"
    assert cuda_visible_devices({}) is None
