"""Arithmetic of memory from a configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from cortex.models.checkpoints.errors import CheckpointError, shown

DELTA_SIZES = {
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
"""What the hybrids of attention and Gated DeltaNet imply; their ``linear_`` layers have a state."""

IMPLIED: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
    "qwen3_next": {"num_key_value_heads": 2, **DELTA_SIZES},
    "qwen3_5": {"num_key_value_heads": 4, **DELTA_SIZES},
    "qwen3_5_text": {"num_key_value_heads": 4, **DELTA_SIZES},
    "qwen3_5_moe": {"num_key_value_heads": 2, **DELTA_SIZES},
    "qwen3_5_moe_text": {"num_key_value_heads": 2, **DELTA_SIZES},
}
"""By model_type, what transformers takes where config.json lacks a key; null is no lack."""

MAX_CONTEXT_TOKENS = 1 << 24  # a damaged header may say more
STATE_ELEMENT_BYTES = 4  # recurrent states are float32, whatever the activations are


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of one head; config.json leaves it out where it is hidden_size / heads."""
    if _stated(config, "head_dim") is not None:
        return _positive(config, "head_dim")
    return _positive(config, "hidden_size") // _positive(config, "num_attention_heads")


def context_tokens(config: Mapping[str, Any]) -> int:
    """Return how many positions the model was made for.

    Who adds YaRN to a config.json, as the cards of Qwen's models say, does not change its
    ``max_position_embeddings``, so that may be short of what YaRN stretches to.
    """
    longest = _positive(config, "max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "yarn":
        return longest
    trained, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if not (_is_within(trained, MAX_CONTEXT_TOKENS) and _is_within(factor, MAX_CONTEXT_TOKENS)):
        return longest
    stretched = int(trained * factor)
    return max(longest, stretched) if stretched <= MAX_CONTEXT_TOKENS else longest


def num_key_value_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key-value heads; null means as many as query heads."""
    if _stated(config, "num_key_value_heads") is not None:
        return _positive(config, "num_key_value_heads")
    return _positive(config, "num_attention_heads")


def implied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return *config* with what its model_type implies."""
    model_type = config.get("model_type")
    return {**(IMPLIED.get(model_type, {}) if isinstance(model_type, str) else {}), **config}


def kv_bytes_per_token(config: Mapping[str, Any], dtype_bytes: int) -> int:
    """Bytes the KV cache needs for one position over all layers; raises CheckpointError."""
    per_layer = 2 * num_key_value_heads(config) * head_dim(config) * dtype_bytes
    return per_layer * (_positive(config, "num_hidden_layers") - linear_layers(config))


def linear_layers(config: Mapping[str, Any]) -> int:
    """Return how many layers have a recurrent state in place of keys and values."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return kinds.count("linear_attention")
    if _stated(config, "full_attention_interval") is None:
        return 0
    layers = _positive(config, "num_hidden_layers")
    return layers - layers // _positive(config, "full_attention_interval")


def state_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the recurrent state of one sequence, or one snapshot of it, over all layers.

    Of a model on several ranks each keeps an even part. Raises CheckpointError.
    """
    layers = linear_layers(config)
    if not layers:
        return 0
    keys = _positive(config, "linear_num_key_heads") * _positive(config, "linear_key_head_dim")
    values = _positive(config, "linear_num_value_heads") * _positive(
        config, "linear_value_head_dim"
    )
    kept = (2 * keys + values) * (_positive(config, "linear_conv_kernel_dim") - 1)
    delta = values * _positive(config, "linear_key_head_dim")
    return layers * (kept + delta) * STATE_ELEMENT_BYTES


def _stated(config: Mapping[str, Any], name: str) -> Any:
    """Return the value that config.json gives or implies."""
    return implied(config).get(name)


def _is_within(value: Any, limit: int) -> TypeGuard[int]:
    """Whether *value* is a number above zero and no more than *limit*."""
    return type(value) in {int, float} and 0 < value <= limit


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = _stated(config, name)
    if type(value) is not int or value <= 0:
        raise CheckpointError(
            f"the configuration's {name} is {shown(value)}, not a positive number"
        )
    return value
