"""Profiles, aliases and what they mean."""

from pathlib import Path

import pytest

from cortex.gateway.catalogue import BUILT_IN, Catalogue, Profile, catalogue_for, load_catalogue
from cortex.ipc.node_api import EMBEDDED_MODEL, Limit, LoadRequest, SamplingDefaults
from cortex.ipc.settings import ConfigError

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"


def written(folder: Path, text: str, name: str = "models.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_loads() -> None:
    catalogue = load_catalogue(PACKAGING / "models.example.toml", ["alpha", "beta"])

    assert catalogue.target("claude-sonnet-local").id == "house-model"


def test_everything_the_example_says_is_asked_of_the_node() -> None:
    catalogue = load_catalogue(PACKAGING / "models.example.toml", ["alpha"])

    assert catalogue.profiles["house-model"].load_request() == LoadRequest(
        model_id="file:/srv/models/SmolLM2-135M-Instruct.Q4_1.gguf",
        quant="Q4_1",
        devices=[0],
        max_context_tokens=4096,
        kv_cache_mb=512,
        max_sequences=8,
        sampling=SamplingDefaults(temperature=0.0, top_p=1.0, top_k=0),
        tool_prompt="hermes",
    )


def test_whatever_a_load_can_say_a_profile_can_say() -> None:
    said = set(LoadRequest.__struct_fields__) - {"model_id", "wait"}

    assert said <= set(Profile.__struct_fields__)


def test_how_a_model_chats_is_asked_of_the_node() -> None:
    profile = Profile("m", tool_prompt="refuse", tool_parser="llama3", reasoning_parser="none")

    assert profile.load_request() == LoadRequest(
        "m", tool_prompt="refuse", tool_parser="llama3", reasoning_parser="none"
    )


def test_the_embedded_model_is_known_without_a_file() -> None:
    assert BUILT_IN.target(EMBEDDED_MODEL).profile == Profile(EMBEDDED_MODEL)


def test_a_name_that_nobody_wrote_down_means_itself() -> None:
    target = BUILT_IN.target("org/model")

    assert (target.id, target.node_id, target.profile) == ("org/model", "org/model", None)


def test_a_source_is_the_name_on_nodes() -> None:
    catalogue = Catalogue({"nice": Profile("nice", source="file:/x.gguf")})

    assert catalogue.target("nice").node_id == "file:/x.gguf"
    assert catalogue.public_id("file:/x.gguf") == "nice"
    assert catalogue.target("file:/x.gguf").id == "nice"


def test_a_declared_limit_is_spelt_as_nodes_do(tmp_path: Path) -> None:
    path = written(tmp_path, '[[models]]\nid = "m"\nlimit = { context = 8 }\n')

    assert load_catalogue(path, []).profiles["m"].known_limit() == Limit(context=8)


def test_a_model_can_be_added() -> None:
    assert BUILT_IN.with_profile("file:/x").target("file:/x").profile == Profile("file:/x")
    assert BUILT_IN.with_profile(EMBEDDED_MODEL) is BUILT_IN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[models]]\nid = "m"\n' * 2, "models.toml:4: models[1].id: 'm' is there twice"),
        (
            '[[models]]\nid = "m"\npinned_on = ["x"]\n',
            "models.toml:3: models[0].pinned_on: no neuron is called 'x'",
        ),
        (
            'aliases = { m = "n" }\n[[models]]\nid = "m"\n',
            "models.toml:1: aliases.m: this is the id of a model",
        ),
        ('aliases = { a = "b", b = "c" }\n', "aliases.a: 'b' is itself an alias"),
        ('[[models]]\nid = "m"\n\nprice = 3\n', "models.toml:4: models[0].price: unknown option"),
        ('aliases = { "" = "b" }\n', "an alias needs a name"),
        (
            '[[models]]\nid = "m"\nsource = "/x"\n[[models]]\nid = "n"\nsource = "/x"\n',
            "models.toml:6: models[1].source: to nodes this is 'm'; [aliases] gives",
        ),
        (
            '[[models]]\nid = "m"\nsource = "smollm2-135m-instruct"\n',
            "models.toml:3: models[0].source: to nodes this is 'smollm2-135m-instruct'",
        ),
        (
            '[[models]]\nid = "m"\ndevices = [0, 0]\n',
            "models.toml:3: models[0].devices: expected indices of devices, each of them once",
        ),
        ('[[models]]\nid = "m"\ndevices = []\n', "models[0].devices: expected indices of devices"),
        (
            '[[models]]\nid = "m"\ndevices = [0]\ntensor_parallel = 2\n',
            "models.toml:4: models[0].tensor_parallel: devices names 1 of them",
        ),
        (
            '[[models]]\nid = "m"\ntensor_parallel = 2\nmin_devices = 4\n',
            "models.toml:4: models[0].min_devices: more than the 2 that it is to have",
        ),
        (
            '[[models]]\nid = "m"\nresidency_priority = -1\n',
            "models.toml:3: models[0].residency_priority: expected `int` >= 0",
        ),
        ('[[models]]\nid = "m"\ncost = { input = 1 }\n', "models.toml:3: models[0].cost: "),
        (
            '[[models]]\nid = "m"\nsampling = { temperature = 9 }\n',
            "models.toml:3: models[0].sampling.temperature: expected `float` <= 2.0",
        ),
    ],
)
def test_a_wrong_catalogue_is_refused_in_words(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_catalogue(written(tmp_path, text), [])

    assert said in str(caught.value)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        catalogue_for("absent.toml", tmp_path / "cortex.toml", [])


def test_the_file_beside_the_configuration_may_be_missing(tmp_path: Path) -> None:
    assert catalogue_for(None, tmp_path / "cortex.toml", []) is BUILT_IN


def test_the_file_beside_the_configuration_is_read(tmp_path: Path) -> None:
    written(tmp_path, '[[models]]\nid = "m"\n')

    assert "m" in catalogue_for(None, tmp_path / "cortex.toml", []).profiles


def test_a_named_file_is_relative_to_the_configuration(tmp_path: Path) -> None:
    written(tmp_path, '[[models]]\nid = "m"\n', "mine.toml")

    assert "m" in catalogue_for("mine.toml", tmp_path / "cortex.toml", []).profiles


@pytest.mark.parametrize(
    ("profile", "residency_class"),
    [
        (Profile("m"), 100),
        (Profile("m", pinned_on=("a",)), 1000),
        (Profile("m", pinned_on=("a",), residency_priority=5), 5),
        (Profile("m", residency_priority=0), 0),
    ],
)
def test_a_model_bound_to_nodes_ranks_higher_unless_told(
    profile: Profile, residency_class: int
) -> None:
    assert profile.residency_class == residency_class


@pytest.mark.parametrize(
    ("profile", "devices"),
    [
        (Profile("m"), 1),
        (Profile("m", min_devices=2), 2),
        (Profile("m", devices=[1, 3]), 2),
        (Profile("m", tensor_parallel=4, min_devices=2), 4),
    ],
)
def test_a_model_is_on_as_many_devices_as_its_profile_says(profile: Profile, devices: int) -> None:
    asked = profile.load_request().tensor_parallel

    assert (profile.device_count, asked or 1) == (devices, devices)


def test_a_scheme_alone_stands_before_the_id() -> None:
    assert Profile("org/m", source="huggingface").node_id == "huggingface:org/m"
