"""Which files of a repository are needed is decided from its listing alone."""

import pytest

from cortex.ipc.downloads import RepoFile
from cortex.ipc.errors import Unloadable
from cortex.runtime.hub_files import (
    HubSource,
    Listing,
    dense_weights,
    describing,
    files_named,
    gguf_file,
    is_in_situ,
    quant_of,
    quants,
    shards,
)

SOURCE = HubSource("acme/tiny")


def listing(*paths: str) -> Listing:
    """Return a repository with files of these names."""
    return Listing("a" * 40, {path: RepoFile(path, 1, "b" * 40) for path in paths})


def refusal(quant: str | None, *paths: str) -> Unloadable:
    """Return in which words a load from a repository of *paths* is refused."""
    files = listing(*paths)
    with pytest.raises(Unloadable) as refused:
        gguf_file(SOURCE, files, quant) if quant else dense_weights(SOURCE, files)
    return refused.value


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("tiny.Q4_K_M.gguf", "Q4_K_M"),
        ("tiny-q8_0.gguf", "Q8_0"),
        ("tiny-fp16.gguf", "F16"),
        ("tiny.BF16.gguf", "BF16"),
        ("tiny-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("tiny-MXFP4.gguf", "MXFP4"),
        ("tiny-Q4_K_M-00001-of-00003.gguf", "Q4_K_M"),
        ("tiny.gguf", None),
        ("tiny-v1.16.gguf", None),
        ("tiny.Q4_0.safetensors", None),
    ],
)
def test_the_name_of_a_file_states_its_quant(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant


def test_exactly_the_file_of_the_quant_is_taken_whatever_the_case() -> None:
    files = listing("a.Q4_0.gguf", "a.Q4_1.gguf", "model.safetensors", "config.json")

    assert gguf_file(SOURCE, files, "q4_1").path == "a.Q4_1.gguf"


def test_a_quant_that_is_not_there_names_the_nearest_by_bits_first() -> None:
    refused = refusal(
        "Q4_K_M", "a.Q2_K.gguf", "a.Q3_K_M.gguf", "a.Q4_0.gguf", "a.Q8_0.gguf", "a.Q4_K_S.gguf"
    )

    assert refused.kind == "quant_not_found"
    assert str(refused) == "acme/tiny has no Q4_K_M; the nearest: Q4_K_S, Q4_0, Q3_K_M"
    assert refused.extras["requested"] == "Q4_K_M"
    assert refused.extras["nearest"] == "Q4_K_S"
    assert refused.extras["available"] == ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_S", "Q8_0"]


def test_a_split_gguf_is_refused_in_words() -> None:
    refused = refusal("Q4_0", "x/a-Q4_0-00001-of-00002.gguf", "x/a-Q4_0-00002-of-00002.gguf")

    assert refused.kind == "split_gguf_unsupported"
    assert "--merge" in str(refused)


def test_two_files_of_one_quant_are_refused_by_name() -> None:
    refused = refusal("Q4_0", "small.Q4_0.gguf", "large.Q4_0.gguf")

    assert refused.kind == "quant_ambiguous"
    assert "large.Q4_0.gguf, small.Q4_0.gguf" in str(refused)


def test_the_eyes_of_a_vision_model_are_no_model() -> None:
    files = listing("a.F16.gguf", "mmproj-a-F16.gguf")

    assert gguf_file(SOURCE, files, "F16").path == "a.F16.gguf"
    assert quants(files) == ["F16"]


@pytest.mark.parametrize(
    ("quant", "files", "is_quantised"),
    [
        ("q8_0", ["model.safetensors"], True),
        ("Q4_0", ["model.safetensors.index.json", "a.Q8_0.gguf"], True),
        ("q8_0", ["model.safetensors", "a.Q8_0.gguf"], False),
        ("Q4_K_M", ["model.safetensors"], False),
        ("q8_0", ["a.Q4_0.gguf"], False),
    ],
)
def test_safetensors_are_quantised_where_no_gguf_file_is_what_was_asked_for(
    quant: str, files: list[str], is_quantised: bool
) -> None:
    assert is_in_situ(listing(*files), quant) is is_quantised


def test_what_safetensors_cannot_become_is_refused_with_what_they_can() -> None:
    refused = refusal("Q4_K_M", "model.safetensors", "config.json", "a.Q6_K.gguf")

    assert refused.kind == "quant_not_found"
    assert {"Q6_K", "q4_0", "fp8"} < set(refused.extras["available"])
    assert refused.extras["nearest"] == "q4_0"


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_without_a_quant_the_safetensors_are_taken(weights: str) -> None:
    files = listing("config.json", "tokenizer.json", weights, "pytorch_model.bin")

    assert dense_weights(SOURCE, files).path == weights


@pytest.mark.parametrize("quant", [None, "Q4_0"])
def test_weights_that_are_only_pickled_are_refused(quant: str | None) -> None:
    refused = refusal(quant, "config.json", "tokenizer.json", "pytorch_model.bin")

    assert refused.kind == "weights_unsupported"
    assert "pytorch_model.bin" in str(refused)
    assert "code" in str(refused)


def test_a_repository_without_weights_is_refused() -> None:
    assert "neither model.safetensors nor GGUF" in str(refusal(None, "README.md"))


def test_a_repository_of_ggufs_asks_for_a_quant() -> None:
    refused = refusal(None, "a.Q4_0.gguf", "a.Q8_0.gguf")

    assert refused.kind == "quant_required"
    assert refused.extras["available"] == ["Q4_0", "Q8_0"]


@pytest.mark.parametrize(
    ("missing", "kind"),
    [("tokenizer.json", "tokenizer_unsupported"), ("config.json", "weights_unsupported")],
)
def test_what_a_load_needs_beside_the_weights_is_missed_before_they_are_fetched(
    missing: str, kind: str
) -> None:
    there = {"config.json", "tokenizer.json", "model.safetensors"} - {missing}

    refused = refusal(None, *there)

    assert (refused.kind, missing in str(refused)) == (kind, True)


def test_only_what_describes_a_model_comes_with_it() -> None:
    files = listing("README.md", "config.json", "onnx/model.onnx", "chat_template.jinja", "x.bin")

    assert [file.path for file in describing(files)] == ["config.json", "chat_template.jinja"]


def test_an_index_names_its_shards_once() -> None:
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}

    assert shards("acme/tiny", index) == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
    ],
)
def test_an_index_that_names_no_safetensors_is_refused(index: dict[str, object]) -> None:
    with pytest.raises(Unloadable) as refused:
        shards("acme/tiny", index)

    assert refused.value.kind == "corrupt_checkpoint"


def test_a_shard_that_is_not_in_the_repository_is_named() -> None:
    with pytest.raises(Unloadable, match=r"index names: 2\.safetensors"):
        files_named(SOURCE, listing("1.safetensors"), ["1.safetensors", "2.safetensors"])
