"""Configurations: what may be left out, how it may be spelled, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from cortex.models.checkpoints.sizes import head_dim, kv_bytes_per_token, num_key_value_heads
from cortex.models.registry import ARCHITECTURES

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def read(model_type: str, **changes: Any) -> Any:
    """Read CONFIG with *changes*; of mistral as all its models without a window have it."""
    window = {"sliding_window": None} if model_type == "mistral" else {}
    sizes = {"num_key_value_heads": 2, "head_dim": 16}
    return ARCHITECTURES[model_type].config({**CONFIG, **sizes, **window, **changes})


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_config_json_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    sizes: dict[str, Any] = {**CONFIG, "num_attention_heads": 32, "hidden_size": 512}
    sizes["model_type"] = model_type
    window = {"sliding_window": None} if model_type == "mistral" else {}

    config = ARCHITECTURES[model_type].config({**sizes, **window})

    theirs = AutoConfig.for_model(**sizes)
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)
    assert config.rope_theta == 10000.0
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == CONFIG["rms_norm_eps"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_supervisor_counts_with_the_sizes_that_the_model_has(model_type: str) -> None:
    raw = {**CONFIG, "num_attention_heads": 32, "hidden_size": 512, "model_type": model_type}

    config = ARCHITECTURES[model_type].config({"sliding_window": None, **raw})

    assert head_dim(raw) == config.head_dim
    assert num_key_value_heads(raw) == config.num_key_value_heads
    per_layer = 2 * config.num_key_value_heads * config.head_dim * 2
    assert kv_bytes_per_token(raw, dtype_bytes=2) == per_layer * 3


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_null_heads_are_as_many_as_query_heads(model_type: str) -> None:
    config = read(model_type, num_key_value_heads=None, head_dim=None)

    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500000},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
    ],
)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_spellings_of_the_rotary_base_are_read(model_type: str, rope: dict[str, Any]) -> None:
    assert read(model_type, **rope).rope_theta == 5e5


YARN = {"rope_type": "yarn", "rope_theta": 1e4}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": YARN}, "yarn"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"v_head_dim": 8}, "v_head_dim"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "do not divide"),
    ({"num_key_value_heads": "two"}, "num_key_value_heads is 'two'"),
    ({"head_dim": 15}, "odd"),
    ({"head_dim": 1 << 13}, "head_dim is 8192"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    ({"vocab_size": 1 << 40}, "vocab_size"),
    ({"vocab_size": 1 << 9999}, "vocab_size is a number of 10000 bits"),
    ({"vocab_size": "many" * 9999}, "vocab_size is 'many.*…, which"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": True}, "rms_norm_eps is True"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": 10**400}, "rope_theta is a number of 1329 bits"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_scaling": "linear"}, "no object"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ({"num_attention_heads": None}, "num_attention_heads"),
]


@pytest.mark.parametrize(("variant", "says"), REFUSED)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_variant_of_any_architecture_is_refused(
    model_type: str, variant: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        read(model_type, **variant)


@pytest.mark.parametrize(
    ("model_type", "variant", "says"),
    [
        ("llama", {"attention_bias": True}, "llama with attention_bias = True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("mistral", {"sliding_window": 4096}, "mistral with sliding_window = 4096"),
        ("qwen2", {"use_sliding_window": True}, "qwen2 with use_sliding_window = True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": "sliding_attention"}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_a_variant_of_one_architecture_is_refused(
    model_type: str, variant: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        ARCHITECTURES[model_type].config({**CONFIG, "model_type": model_type, **variant})


def test_the_window_of_a_mistral_that_does_not_speak_of_it_slides() -> None:
    with pytest.raises(ValueError, match="sliding_window = 4096"):
        ARCHITECTURES["mistral"].config(CONFIG)
