"""What can never work is refused before anything is allocated, with its numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.runtime import preflight
from cortex.runtime.sources import FileSource, PypiSource
from tiny_text import TINY_LLAMA, metadata_of, trained, write_gguf

GIGABYTE = 1 << 30


def asking(**fields: Any) -> LoadRequest:
    return LoadRequest(**({"model_id": "smollm2-135m-instruct"} | fields))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A GGUF file of the llama architecture in F32."""
    metadata = TINY_LLAMA | metadata_of(trained("smollm"), "smollm")
    return write_gguf(tmp_path / "tiny.gguf", metadata)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A directory with safetensors."""
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    return tmp_path


def refusal(path: Path, request: LoadRequest, memory_bytes: int = GIGABYTE) -> Unloadable:
    with pytest.raises(Unloadable) as refused:
        preflight.check(path, request, memory_bytes)
    return refused.value


# the request alone


def test_the_embedded_model_needs_no_more_than_its_name() -> None:
    assert isinstance(preflight.check_request(asking()), PypiSource)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"tensor_parallel": 2, "devices": [0]}, "devices_mismatch"),
        ({"tensor_parallel": 1, "devices": [0, 1]}, "devices_mismatch"),
        ({"devices": [1, 1]}, "devices_mismatch"),
        ({"devices": []}, "no_such_device"),
    ],
)
def test_devices_and_their_number_that_do_not_agree_are_refused(
    fields: dict[str, Any], kind: str
) -> None:
    with pytest.raises(Unloadable) as refused:
        preflight.check_request(asking(**fields))

    assert refused.value.kind == kind


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [({}, 1), ({"devices": [3]}, 1), ({"devices": [0, 2]}, 2), ({"tensor_parallel": 4}, 4)],
)
def test_devices_are_as_many_as_are_named_unless_a_number_is_given(
    fields: dict[str, Any], ranks: int
) -> None:
    request = asking(**fields)

    assert isinstance(preflight.check_request(request), PypiSource)
    assert request.ranks == ranks


def test_a_quant_that_the_source_contradicts_is_refused_without_a_download() -> None:
    with pytest.raises(Unloadable, match="holds Q4_1, not Q8_0") as refused:
        preflight.check_request(asking(quant="Q8_0"))

    assert refused.value.extras["nearest"] == "Q4_1"


def test_files_outside_of_the_configured_roots_are_refused(tmp_path: Path) -> None:
    request = asking(model_id=f"file:{tmp_path}")

    assert preflight.check_request(request) == FileSource(tmp_path)
    with pytest.raises(Unloadable) as refused:
        preflight.check_request(request, roots=[])

    assert refused.value.kind == "path_not_allowed"


# the checkpoint


def test_the_embedded_model_fits_where_it_fits(embedded_model: Path) -> None:
    checkpoint = preflight.check(embedded_model, asking(quant="q4_1"), GIGABYTE)

    assert checkpoint.quant == "Q4_1"


def test_a_file_as_it_is_needs_no_quant(tiny: Path) -> None:
    assert preflight.check(tiny, asking(), GIGABYTE).quant == "F32"


def test_another_quant_than_the_files_is_refused_with_what_there_is(tiny: Path) -> None:
    refused = refusal(tiny, asking(quant="Q4_K_M"))

    assert refused.kind == "quant_not_found"
    assert refused.extras["available"] == ["F32"]
    assert refused.extras["nearest"] == "F32"


def test_a_dense_checkpoint_is_loaded_as_it_is(dense: Path) -> None:
    assert preflight.check(dense, asking(), GIGABYTE).quant is None


@pytest.mark.parametrize("quant", ["q8_0", "Q4_0", "fp8"])
def test_a_dense_checkpoint_may_be_quantised_while_it_is_loaded(dense: Path, quant: str) -> None:
    checkpoint = preflight.check(dense, asking(quant=quant), GIGABYTE)

    assert preflight.in_situ(checkpoint, quant) == quant.lower()


def test_a_dense_checkpoint_becomes_no_k_quant(dense: Path) -> None:
    refused = refusal(dense, asking(quant="Q4_K_M"))

    assert refused.kind == "quant_not_found"
    assert refused.extras["available"] == ["fp8", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


@pytest.mark.parametrize(("quant", "is_refused"), [("FP8", False), ("q8_0", True)])
def test_an_fp8_checkpoint_is_what_it_is(dense: Path, quant: str, is_refused: bool) -> None:
    config = json.loads((dense / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": said}))

    if is_refused:
        assert refusal(dense, asking(quant=quant)).extras["available"] == ["fp8"]
    else:
        assert preflight.in_situ(preflight.opened(dense), quant) is None


def test_a_gguf_file_is_not_quantised_again(tiny: Path) -> None:
    assert preflight.in_situ(preflight.opened(tiny), "f32") is None


def test_heads_that_do_not_divide_are_refused_with_the_numbers(dense: Path) -> None:
    refused = refusal(dense, asking(tensor_parallel=3))

    assert refused.kind == "ranks_indivisible"
    assert (refused.extras["size"], refused.extras["ranks"]) == (1, 3)
    assert str(refused).startswith("1 query heads do not divide among 3 ranks")


def test_a_shared_model_is_refused_by_the_numbers_of_one_device(tmp_path: Path) -> None:
    path = two_heads(tmp_path)
    whole, half = (
        refusal(path, asking(tensor_parallel=ranks), memory_bytes=1).extras for ranks in (1, 2)
    )

    assert "ranks" not in whole
    assert half["ranks"] == 2
    assert half["kv_bytes"] == whole["kv_bytes"] // 2
    assert whole["weights_bytes"] // 2 < half["weights_bytes"] < whole["weights_bytes"]


def two_heads(directory: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return directory


def test_a_damaged_file_is_refused(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-1000])

    assert refusal(tiny, asking()).kind == "corrupt_checkpoint"


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.gguf", asking()).kind == "corrupt_checkpoint"


def test_an_architecture_nobody_wrote_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata_of(trained("qwen2"), "qwen2"), "mamba")

    refused = refusal(path, asking())

    assert refused.kind == "architecture_unsupported"
    assert refused.extras["requested"] == "mamba"
    assert "llama" in refused.extras["available"]


def test_a_tensor_type_nobody_multiplies_with_is_refused(dense: Path) -> None:
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))

    refused = refusal(dense, asking())

    assert refused.kind == "tensor_type_unsupported"
    assert refused.extras["requested"] == ["I32"]


def test_more_context_than_the_model_was_made_for_is_refused(tiny: Path) -> None:
    refused = refusal(tiny, asking(max_context_tokens=2000))

    assert refused.kind == "context_too_long"
    assert refused.extras["maximum_tokens"] == 1024


def test_a_configuration_without_a_context_length_is_refused(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"max_position_embeddings": None}))

    assert "max_position_embeddings is None" in str(refusal(dense, asking()))


# memory; a token of the tiny model takes 2 layers x 2 (K, V) x 2 heads x 16 x 2 bytes = 256


@pytest.mark.parametrize(
    ("fields", "kv_bytes"),
    [
        ({}, 512 * 256),
        ({"max_context_tokens": 1000}, 1000 * 256),
        ({"max_context_tokens": 1000, "dtype": "float32"}, 1000 * 512),
        ({"kv_cache_mb": 3}, 3 << 20),
    ],
)
def test_weights_and_the_smallest_cache_must_fit_to_the_byte(
    tiny: Path, fields: dict[str, Any], kv_bytes: int
) -> None:
    weights_bytes = preflight.check(tiny, asking(), GIGABYTE).weights_bytes
    preflight.check(tiny, asking(**fields), weights_bytes + kv_bytes)

    refused = refusal(tiny, asking(**fields), weights_bytes + kv_bytes - 1)

    assert refused.kind == "insufficient_memory"
    assert refused.extras["kv_bytes"] == kv_bytes
    assert refused.extras["weights_bytes"] == weights_bytes


def test_a_model_with_a_short_context_needs_no_more_than_that(tmp_path: Path) -> None:
    metadata = TINY_LLAMA | {"llama.context_length": 64} | metadata_of(trained("smollm"), "smollm")
    path = write_gguf(tmp_path / "tiny.gguf", metadata)

    assert refusal(path, asking(), memory_bytes=1).extras["kv_bytes"] == 64 * 256
