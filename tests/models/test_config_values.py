"""Configurations: what may be left out, how it may be spelled, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from cortex.models.checkpoints.sizes import head_dim, kv_bytes_per_token, num_key_value_heads
from cortex.models.config_values import rope
from cortex.models.mixture import MixtureShape
from cortex.models.registry import ARCHITECTURES as ALL
from cortex.models.rope import Factors, Linear, Llama3, Rope, Yarn, frequencies

ARCHITECTURES = {name: ALL[name] for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")}

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
    assert config.rope == Rope(config.head_dim, 10000.0)
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
    assert read(model_type, **rope).rope == Rope(16, 5e5)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PAPER = 0.1 * math.log(4.0) + 1.0


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_scaling": {"type": "default"}}, None),
        ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Linear(2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, Linear(2.0)),
        ({"rope_scaling": LLAMA3}, Llama3(8.0, 1.0, 4.0, 128)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, Llama3(8.0, 1.0, 4.0, 128)),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, 512),
        ({"rope_scaling": {**YARN, "type": "yarn"}}, Yarn(4.0, 128, PAPER)),
        ({"rope_parameters": YARN}, Yarn(4.0, 128, PAPER)),
        ({"rope_parameters": {**YARN, "factor": None}}, Yarn(4.0, 128, PAPER)),
        ({"rope_parameters": {**YARN, "attention_factor": 0.5}}, Yarn(4.0, 128, 0.5)),
        ({"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2}}, (8.0, 2.0)),
        ({"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, Yarn(4.0, 128, 1.0)),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, Yarn(0.5, 128, 1.0)),
        ({"rope_parameters": {**YARN, "truncate": False}}, False),
        ({"rope_scaling": {"rope_type": "factors", "factors": [2.0] * 8}}, Factors((2.0,) * 8)),
    ],
)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_scaled_rotary_positions_are_read_as_transformers_4_and_5_write_them(
    model_type: str, rope: dict[str, Any], scaling: Any
) -> None:
    found = read(model_type, **rope).rope.scaling

    match scaling:
        case int() if scaling is not False:
            assert found.original_tokens == scaling
        case (fast, slow):
            assert (found.fast_turns, found.slow_turns) == (fast, slow)
        case False:
            assert not found.is_truncated
        case _:
            assert found == scaling


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "of the type 'dynamic'"),
    ({"rope_scaling": {"type": "longrope"}}, "of the type 'longrope'"),
    ({"rope_scaling": {"type": 7}}, "of the type 7"),
    ({"rope_scaling": {"type": "linear"}}, "factor is None"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8'"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "4.0 is not below high_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "high_freq_factor is None"),
    (
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 1.5}},
        "original_max.* is 1.5",
    ),
    ({"rope_parameters": {**YARN, "extrapolation_factor": 0.5}}, "extrapolation_factor = 0.5"),
    ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta above 1"),
    ({"rope_parameters": {**YARN, "attention_factor": -1.0}}, "attention_factor is -1.0"),
    ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate is 1"),
    ({"rope_parameters": {**YARN, "beta_fast": "fast"}}, "beta_fast is 'fast'"),
    ({"rope_scaling": {"type": "factors", "factors": [1.0] * 7}}, "factors of 8 rotary pairs"),
    ({"rope_scaling": {"type": "factors", "factors": [0.0] * 8}}, "factors is 0.0"),
    ({"rope_scaling": {"type": "factors"}}, "factors of 8 rotary pairs are None"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
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
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts"),
        ("qwen2", {"num_local_experts": 8}, "num_local_experts"),
        ("qwen3", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"attention_bias": True}, "llama with attention_bias = True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("mistral", {"sliding_window": 4096}, "mistral with sliding_window = 4096"),
        ("qwen2", {"use_sliding_window": True}, "qwen2 with use_sliding_window = True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": "sliding_attention"}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3_moe", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, "5 experts per token"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts is 0"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ("qwen3_moe", {"num_hidden_layers": 1 << 20}, "num_hidden_layers is 1048576"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5"),
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


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts_are_read(name: str) -> None:
    experts = {name: 12, "num_experts_per_tok": 4, "moe_intermediate_size": 24}

    config = read("qwen3_moe", **experts, norm_topk_prob=True)

    assert config.mixture == MixtureShape(12, 4, 24, is_normalised=True)


def test_a_mixture_that_says_nothing_of_its_experts_has_those_of_transformers() -> None:
    theirs = AutoConfig.for_model("qwen3_moe")

    mixture = read("qwen3_moe").mixture

    assert mixture == MixtureShape(
        theirs.num_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        is_normalised=theirs.norm_topk_prob,
    )


def test_a_mixture_may_have_dense_layers() -> None:
    assert read("qwen3_moe").dense_layers == frozenset()
    assert read("qwen3_moe", mlp_only_layers=[0, 2]).dense_layers == {0, 2}
    assert read("qwen3_moe", decoder_sparse_step=2).dense_layers == {0, 2}


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 30),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 2), max_size=2),
    st.dictionaries(st.sampled_from(sorted(YARN | LLAMA3)), st.integers(-1, 9), max_size=3),
)
KEYS = sorted(
    {
        *CONFIG,
        *("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters"),
        *("partial_rotary_factor", "tie_word_embeddings", "hidden_act", "attention_bias"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers", "layer_types", "use_sliding_window"),
    }
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(ARCHITECTURES)), st.dictionaries(st.sampled_from(KEYS), WRONG))
def test_a_config_json_with_anything_in_it_is_read_or_refused(
    model_type: str, changes: dict[str, Any]
) -> None:
    try:
        config = read(model_type, **changes)
    except ValueError:
        return
    assert 0 < config.rope.dim <= config.head_dim


@given(
    st.sampled_from(["linear", "llama3", "yarn", "factors"]),
    st.dictionaries(
        st.sampled_from([*YARN, *LLAMA3, "beta_fast", "attention_factor", "mscale", "factors"]),
        WRONG,
    ),
)
def test_scaled_rotary_positions_with_anything_in_them_are_numbers_or_refused(
    kind: str, changes: dict[str, Any]
) -> None:
    rope = {**LLAMA3, **YARN, **changes, "rope_type": kind}
    try:
        found = read("llama", rope_parameters=rope).rope
    except ValueError:
        return
    assert frequencies(found).isfinite().all()


@pytest.mark.parametrize(("share", "dim"), [(0.24, 24), (0.58, 58), (1.0, 100)])
def test_a_part_of_a_head_may_turn_where_the_architecture_knows_it(share: float, dim: int) -> None:
    raw = {**CONFIG, "head_dim": 100, "partial_rotary_factor": share}

    assert rope(raw, has_partial=True).dim == dim


@pytest.mark.parametrize("share", [0.25, 0.01])
def test_what_turns_of_a_head_must_be_pairs(share: float) -> None:
    with pytest.raises(ValueError, match="elements of a head turn"):
        rope({**CONFIG, "head_dim": 100, "partial_rotary_factor": share}, has_partial=True)
