"""Arithmetic of memory from a configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cortex.models.checkpoints.errors import CheckpointError, shown

IMPLIED: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""By model_type, what transformers takes where config.json lacks a key; null is no lack."""


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of one head; config.json leaves it out where it is hidden_size / heads."""
    if _stated(config, "head_dim") is not None:
        return _positive(config, "head_dim")
    return _positive(config, "hidden_size") // _positive(config, "num_attention_heads")


def num_key_value_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key-value heads; null means as many as query heads."""
    if _stated(config, "num_key_value_heads") is not None:
        return _positive(config, "num_key_value_heads")
    return _positive(config, "num_attention_heads")


def kv_bytes_per_token(config: Mapping[str, Any], dtype_bytes: int) -> int:
    """Bytes the KV cache needs for one position over all layers; raises CheckpointError."""
    per_layer = 2 * num_key_value_heads(config) * head_dim(config) * dtype_bytes
    return per_layer * _positive(config, "num_hidden_layers")


def _stated(config: Mapping[str, Any], name: str) -> Any:
    """Return the value that config.json gives or implies."""
    if name in config:
        return config[name]
    model_type = config.get("model_type")
    return IMPLIED.get(model_type, {}).get(name) if isinstance(model_type, str) else None


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = _stated(config, name)
    if type(value) is not int or value <= 0:
        raise CheckpointError(
            f"the configuration's {name} is {shown(value)}, not a positive number"
        )
    return value
