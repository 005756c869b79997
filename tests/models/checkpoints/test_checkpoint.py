"""One face for GGUF files and directories: configuration, sizes, what is supported."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from cortex.models import registry
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.config import config_of, generation_config_of
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.names import is_derived, parameter_name
from cortex.models.checkpoints.sizes import context_tokens, kv_bytes_per_token
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.llama import LlamaConfig
from cortex.models.mixture import MixtureShape
from cortex.models.rope import Factors, Linear, Yarn
from tiny_models import random_llama, random_model, saved_llama, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 100,
}


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
PAPER = 0.1 * math.log(4.0) + 1.0


def config(metadata: dict[str, Any], *tensors: str) -> dict[str, Any]:
    infos = {name: TensorInfo(name, (7, 64), "F32", Path("a.gguf"), 0, 0) for name in tensors}
    return config_of(GGUFFile(Path("a.gguf"), {**METADATA, **metadata}, infos))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_a_gguf_file_has_the_configuration_it_was_converted_from(
    tmp_path: Path, model_type: str
) -> None:
    sizes = {"head_dim": 32, "rms_norm_eps": 2.0**-17, "tie_word_embeddings": True}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    model = random_model(model_type, **sizes, **rope)
    write_gguf(tmp_path / "tiny.gguf", model, "F32")
    model.save_pretrained(tmp_path / "dense")
    read = registry.ARCHITECTURES[model_type].config

    ours = read(Checkpoint.open(tmp_path / "tiny.gguf").config)

    assert ours == read(Checkpoint.open(tmp_path / "dense").config)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("attention.sliding_window", 4096, "use_sliding_window = True"),
        ("rope.scaling.type", "longrope", "longrope"),
        ("expert_count", 8, "num_local_experts = 8"),
    ],
)
def test_a_variant_of_qwen_that_a_gguf_file_can_say_is_refused(
    model_type: str, key: str, value: Any, says: str
) -> None:
    metadata = {key.replace("llama", model_type): value for key, value in METADATA.items()}
    metadata |= {"general.architecture": model_type, f"{model_type}.{key}": value}
    file = GGUFFile(Path("a.gguf"), metadata, {})

    with pytest.raises(ValueError, match=says):
        registry.ARCHITECTURES[model_type].config(config_of(file))


def test_a_bias_is_another_model_of_qwen3_but_not_of_qwen2() -> None:
    found = {}
    for model_type in ("qwen2", "qwen3"):
        metadata = {key.replace("llama", model_type): value for key, value in METADATA.items()}
        metadata["general.architecture"] = model_type
        name = "blk.0.attn_q.bias"
        tensors = {name: TensorInfo(name, (64,), "F32", Path("a.gguf"), 0, 256)}
        found[model_type] = config_of(GGUFFile(Path("a.gguf"), metadata, tensors))

    assert "attention_bias" not in found["qwen2"]
    with pytest.raises(ValueError, match="qwen3 with attention_bias = True"):
        registry.ARCHITECTURES["qwen3"].config(found["qwen3"])


def test_a_file_without_an_output_matrix_is_tied() -> None:
    assert config({})["tie_word_embeddings"] is True
    assert config({}, "output.weight")["tie_word_embeddings"] is False


def test_the_vocabulary_is_as_large_as_the_embedding() -> None:
    assert config({}, "token_embd.weight")["vocab_size"] == 7


def test_without_an_embedding_the_vocabulary_is_what_the_metadata_says() -> None:
    words = {"llama.vocab_size": None, "tokenizer.ggml.tokens": ["a", "b"]}

    assert config({})["vocab_size"] == 100
    assert config(words)["vocab_size"] == 2


@pytest.mark.parametrize("name", [key for key in METADATA if key != "llama.vocab_size"])
def test_a_key_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"a.gguf: {name} is missing"):
        config({name: None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 0),
        ("llama.block_count", 2.5),
        ("llama.block_count", True),
        ("llama.attention.head_count_kv", [1, 2, 3]),
        ("llama.rope.freq_base", "1e4"),
        ("llama.rope.freq_base", float("nan")),
    ],
)
def test_a_value_that_is_no_size_is_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"{key} is .*, not a positive"):
        config({key: value})


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({"llama.rope.scaling.type": "longrope"}, (), "longrope"),
        ({"llama.rope.scaling.type": "yarn"}, (), "rope.scaling.factor is missing"),
        ({**YARN, "llama.rope.scaling.yarn_ext_factor": 0.5}, (), "extrapolation_factor = 0.5"),
        ({**YARN, "llama.rope.scaling.yarn_log_multiplier": 0.1}, (), "yarn_log_multiplier"),
        ({"llama.rope.scaling.factor": "much"}, (), "factor is 'much'"),
        ({"llama.expert_count": 8}, (), "num_local_experts"),
        ({"llama.attention.sliding_window": 4096}, (), "sliding_window"),
        ({"llama.attention.key_length": 16, "llama.attention.value_length": 8}, (), "v_head_dim"),
        ({"llama.rope.dimension_count": 8}, (), "partial_rotary_factor"),
        ({}, ("blk.0.attn_q.bias",), "attention_bias"),
        ({}, ("blk.0.ffn_down.bias",), "mlp_bias"),
    ],
)
def test_a_variant_a_gguf_file_can_say_reaches_the_one_who_refuses_it(
    metadata: dict[str, Any], tensors: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        LlamaConfig.from_json(config(metadata, *tensors))


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.factor": 4.0}, Linear(4.0)),
        ({"llama.rope.scale_linear": 4.0}, Linear(4.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, Linear(4.0)),
        (YARN, Yarn(4.0, 512, 0.1 * math.log(4.0) + 1.0)),
        (
            {**YARN, "llama.rope.scaling.attn_factor": 0.5},
            Yarn(4.0, 512, 0.05 * math.log(4.0) + 0.5),
        ),
        ({**YARN, "llama.rope.scaling.yarn_attn_factor": 1.5}, Yarn(4.0, 512, 1.5)),
        ({**YARN, "llama.rope.scaling.yarn_ext_factor": -1.0}, Yarn(4.0, 512, PAPER)),
        ({**YARN, "llama.rope.scaling.original_context_length": 64}, Yarn(4.0, 64, PAPER)),
        (
            {
                **YARN,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
            },
            Yarn(4.0, 512, PAPER, 16.0, 2.0),
        ),
        ({**YARN, "llama.rope.scaling.factor": 1.0}, Yarn(1.0, 512, 1.0)),
    ],
)
def test_scaled_rotary_positions_are_read(metadata: dict[str, Any], scaling: Any) -> None:
    assert LlamaConfig.from_json(config(metadata)).rope.scaling == scaling


HYBRID_METADATA = {
    **{f"qwen35.{name.partition('.')[2]}": value for name, value in METADATA.items()},
    "general.architecture": "qwen35",
    "qwen35.block_count": 4,
    "qwen35.nextn_predict_layers": 1,
    "qwen35.attention.head_count_kv": 2,
    **{f"qwen35.ssm.{name}": 4 for name in ("conv_kernel", "state_size", "group_count")},
    "qwen35.ssm.time_step_rank": 4,
    "qwen35.ssm.inner_size": 16,
}


def hybrid_config(metadata: dict[str, Any]) -> dict[str, Any]:
    return config_of(GGUFFile(Path("a.gguf"), {**HYBRID_METADATA, **metadata}, {}))


def test_a_hybrid_may_say_of_each_layer_whether_it_has_a_state() -> None:
    found = hybrid_config({"qwen35.attention.recurrent_layers": [True, False, True, False]})

    kinds = ["linear_attention", "full_attention", "linear_attention"]  # the last block drafts
    assert found["layer_types"] == kinds
    assert "layer_types" not in hybrid_config({})


def test_a_hybrid_may_say_the_key_value_heads_of_each_layer() -> None:
    found = hybrid_config({"qwen35.attention.head_count_kv": [0, 0, 2, 0]})

    assert found["num_key_value_heads"] == 2


@pytest.mark.parametrize("heads", [[0, 0], [], [2, 4], [0, -2], ["2"], [2.0], [True]])
def test_layers_with_other_key_value_heads_are_refused(heads: list[Any]) -> None:
    with pytest.raises(CheckpointError, match=r"head_count_kv is .*, not a positive"):
        hybrid_config({"qwen35.attention.head_count_kv": heads})


def test_heads_of_each_layer_are_for_hybrids_alone() -> None:
    with pytest.raises(CheckpointError, match=r"head_count_kv is .*, not a positive"):
        config({"llama.attention.head_count_kv": [0, 2, 2]})


STRETCHED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_scaling": STRETCHED}, 512),
        ({"rope_scaling": {**STRETCHED, "type": None, "rope_type": "yarn"}}, 512),
        ({"rope_parameters": STRETCHED}, 512),
        ({"rope_scaling": {**STRETCHED, "factor": 2.5}}, 320),
        ({"rope_scaling": {**STRETCHED, "factor": 1}}, 160),  # less than it was trained on
        ({"rope_scaling": {**STRETCHED, "type": "linear"}}, 160),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 160),
        ({"rope_scaling": {**STRETCHED, "factor": None}}, 160),
        ({"rope_scaling": {**STRETCHED, "factor": "4"}}, 160),
        ({"rope_scaling": {**STRETCHED, "factor": math.nan}}, 160),
        ({"rope_scaling": {**STRETCHED, "factor": 1 << 20}}, 160),  # damaged
        ({"rope_scaling": {**STRETCHED, "original_max_position_embeddings": 10**400}}, 160),
        ({"rope_scaling": "yarn"}, 160),
        ({"rope_scaling": None}, 160),
    ],
)
def test_a_model_was_made_for_the_context_that_yarn_stretches_to(
    rope: dict[str, Any], tokens: int
) -> None:
    assert context_tokens({"max_position_embeddings": 160, **rope}) == tokens


def test_a_gguf_file_that_names_no_context_to_stretch_was_stretched_before() -> None:
    said = {**YARN, "llama.rope.scaling.original_context_length": 512}

    assert (context_tokens(config(YARN)), context_tokens(config(said))) == (512, 2048)


def with_factors(path: Path, kind: str, size: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """Read the configuration of a file whose factors of 8 rotary pairs are at *path*."""
    tensor = TensorInfo("rope_freqs.weight", (size,), kind, path, 4, 4 * size)
    return config_of(GGUFFile(path, {**METADATA, **metadata}, {tensor.name: tensor}))


def test_rotary_positions_may_have_a_factor_for_each_pair(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<9f", 7, *range(1, 9)))

    found = with_factors(tmp_path / "a", "F32", 8, {"llama.rope.scaling.type": "linear"})

    expected = Factors((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))
    assert LlamaConfig.from_json(found).rope.scaling == expected


def test_factors_of_rotary_pairs_and_another_scaling_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<9f", 7, *range(1, 9)))

    with pytest.raises(ValueError, match="'yarn with factors'"):
        LlamaConfig.from_json(with_factors(tmp_path / "a", "F32", 8, YARN))


@pytest.mark.parametrize(
    ("kind", "size", "says"),
    [
        ("F16", 8, "no vector of at most"),
        ("F32", 1 << 20, "no vector of at most"),
        ("F32", 10, "the file ended within 'rope_freqs.weight'"),
        ("F32", 7, "the factors of 8 rotary pairs are"),
    ],
)
def test_factors_that_are_none_are_refused(tmp_path: Path, kind: str, size: int, says: str) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<9f", 7, *range(1, 9)))

    with pytest.raises(ValueError, match=says):
        LlamaConfig.from_json(with_factors(tmp_path / "a", kind, size, {}))


def test_factors_in_a_file_that_is_gone_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        with_factors(tmp_path / "gone", "F32", 8, {})


MIXTURE = {
    **{key.replace("llama.", "qwen3moe."): value for key, value in METADATA.items()},
    "general.architecture": "qwen3moe",
    "qwen3moe.expert_count": 8,
    "qwen3moe.expert_used_count": 3,
    "qwen3moe.expert_feed_forward_length": 24,
}


def test_a_mixture_in_a_gguf_file_is_one_of_config_json() -> None:
    found = config_of(GGUFFile(Path("a.gguf"), MIXTURE, {}))

    read = registry.ARCHITECTURES["qwen3_moe"].config(found)

    assert found["model_type"] == "qwen3_moe"
    assert read.mixture == MixtureShape(8, 3, 24, is_normalised=True)
    assert (read.intermediate_size, read.dense_layers) == (96, frozenset())


def test_a_mixture_need_not_say_how_large_a_dense_layer_would_be() -> None:
    metadata = {**MIXTURE, "qwen3moe.feed_forward_length": None}

    assert config_of(GGUFFile(Path("a.gguf"), metadata, {}))["intermediate_size"] == 24


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("expert_used_count", None, "qwen3moe.expert_used_count is missing"),
        ("expert_feed_forward_length", None, "expert_feed_forward_length is missing"),
        ("expert_count", "eight", "expert_count is 'eight'"),
        ("expert_used_count", 9, "9 experts per token, but there are only 8"),
        ("expert_gating_func", 2, "gating function 2"),
        ("expert_weights_scale", 2.5, "routed_scaling_factor = 2.5"),
        ("expert_shared_feed_forward_length", 1.5, "expert_shared_feed_forward_length is 1.5"),
    ],
)
def test_a_mixture_that_is_another_is_refused(key: str, value: Any, says: str) -> None:
    metadata = {**MIXTURE, f"qwen3moe.{key}": value}

    with pytest.raises(ValueError, match=says):
        registry.ARCHITECTURES["qwen3_moe"].config(
            config_of(GGUFFile(Path("a.gguf"), metadata, {}))
        )


def test_the_gate_of_a_shared_expert_is_a_matrix_of_one_row(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    for name, shape in {"ffn_gate_inp_shexp": 64, "ffn_gate_inp": (4, 64), "ffn_norm": 64}.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tensors = Checkpoint.open(tmp_path / "a.gguf").tensors

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {
        "blk.0.ffn_gate_inp_shexp.weight": (1, 64),
        "blk.0.ffn_gate_inp.weight": (4, 64),
        "blk.0.ffn_norm.weight": (64,),
    }


def test_of_another_architecture_only_the_name_is_known() -> None:
    assert config({"general.architecture": "mamba"}) == {"model_type": "mamba"}


def test_generation_ends_at_every_end_token_a_gguf_file_names() -> None:
    metadata = {
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 40,
    }

    assert generation_config_of(metadata) == {
        "temperature": 0.5,
        "top_k": 40,
        "eos_token_id": [2, 5],
        "bos_token_id": 1,
        "pad_token_id": 0,
    }


def test_a_file_that_says_nothing_of_generation_has_no_defaults() -> None:
    assert generation_config_of({}) == {}


def test_a_directory_is_read_with_its_generation_config(tmp_path: Path) -> None:
    saved_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')

    checkpoint = Checkpoint.open(tmp_path)

    assert checkpoint.format == "safetensors"
    assert checkpoint.quant is None
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.config["model_type"] == "llama"


def test_a_directory_may_have_no_generation_config(tmp_path: Path) -> None:
    saved_llama(tmp_path)
    (tmp_path / "generation_config.json").unlink()

    assert Checkpoint.open(tmp_path).generation_config == {}


def test_the_quant_of_a_gguf_file_is_that_of_most_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_1")

    checkpoint = Checkpoint.open(tmp_path / "tiny.gguf")

    assert (checkpoint.format, checkpoint.quant) == ("gguf", "Q4_1")
    data = gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    assert checkpoint.weights_bytes == sum(tensor.n_bytes for tensor in data)


def test_a_part_of_a_split_gguf_file_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "F32", split__count=3)

    with pytest.raises(CheckpointError, match="one of 3 files of a split GGUF"):
        Checkpoint.open(tmp_path / "tiny.gguf")


def test_a_gguf_file_without_tensors_has_no_quant(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    assert Checkpoint.open(tmp_path / "a.gguf").quant is None


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "neither model.safetensors, nor model.safetensors.index.json, nor a GGUF"),
        (["b.gguf", "a.gguf"], "name one of them, e.g. a.gguf"),
    ],
)
def test_a_directory_without_weights_says_what_it_has(
    tmp_path: Path, files: list[str], says: str
) -> None:
    for name in files:
        (tmp_path / name).touch()

    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        (" " * (1 << 24) + "{}", "larger than"),
    ],
)
def test_a_damaged_config_json_is_refused_in_words(
    tmp_path: Path, content: str | None, says: str
) -> None:
    saved_llama(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    with pytest.raises(CheckpointError, match=rf"config.json.*{says}"):
        Checkpoint.open(tmp_path)


def test_what_is_supported_passes_the_check(tmp_path: Path) -> None:
    saved_llama(tmp_path)

    Checkpoint.open(tmp_path).check_supported()


@pytest.mark.parametrize("model_type", [None, 7, ["llama"], "a" * 101])
def test_a_model_type_that_is_no_name_is_refused(tmp_path: Path, model_type: Any) -> None:
    saved_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    with pytest.raises(CheckpointError, match="is no name"):
        Checkpoint.open(tmp_path)


def test_another_model_type_does_not_pass_the_check(tmp_path: Path) -> None:
    saved_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))

    with pytest.raises(CheckpointError, match="'mamba' is not supported; supported: llama"):
        Checkpoint.open(tmp_path).check_supported()


def test_a_quantisation_without_kernels_does_not_pass_the_check(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor(
        "output.weight", np.zeros((1, 110), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ3_S
    )
    for key, value in METADATA.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match=r"'output.weight' is stored as IQ3_S"):
        Checkpoint.open(tmp_path / "a.gguf").check_supported()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("token_embd.weight", "embed_tokens.weight"),
        ("blk.12.ffn_gate.weight", "layers.12.mlp.gate_proj.weight"),
        ("blk.0.attn_q.bias", "layers.0.self_attn.q_proj.bias"),
        ("blk.3.attn_k_norm.weight", "layers.3.self_attn.k_norm.weight"),
        ("blk.0.unheard_of.weight", "blk.0.unheard_of.weight"),
    ],
)
def test_gguf_names_become_ours(name: str, ours: str) -> None:
    assert parameter_name(name, "gguf") == ours


def test_safetensors_names_lose_their_prefix() -> None:
    assert parameter_name("model.norm.weight", "safetensors") == "norm.weight"
    assert parameter_name("lm_head.weight", "safetensors") == "lm_head.weight"


def test_only_frequencies_are_derived() -> None:
    assert is_derived("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_derived("model.norm.weight")


def test_kv_bytes_count_both_sides_of_every_layer() -> None:
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 16}

    assert kv_bytes_per_token(sizes, dtype_bytes=4) == 2 * 3 * 2 * 16 * 4


def test_kv_bytes_know_what_config_json_may_leave_out() -> None:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64}

    assert kv_bytes_per_token(sizes, dtype_bytes=2) == 2 * 3 * 4 * 16 * 2


def test_kv_bytes_of_a_configuration_without_sizes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="num_attention_heads is None"):
        kv_bytes_per_token({}, dtype_bytes=4)
