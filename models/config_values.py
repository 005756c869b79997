"""Values out of a config.json, which is not trusted: what is no value of a model is a ValueError.

The names are those of config.json; what a key means where it is absent is the architecture's to
say, except what ``checkpoints.sizes`` must know without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cortex.models.checkpoints.errors import shown
from cortex.models.checkpoints.sizes import head_dim, num_key_value_heads

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
MAX_SIZE = 1 << 24  # no dimension of a real model is near; a damaged header's may be beyond
MAX_HEAD_DIM = 1 << 12
MAX_NUMBER = 1e30


def refuse_other(raw: Mapping[str, Any], only: Mapping[str, Collection[Any]]) -> None:
    """Refuse keys that make another model of it: *only* has the values implemented."""
    for name, values in only.items():
        if raw.get(name) not in values:
            raise _unsupported(raw, f"{name} = {shown(raw.get(name))}")


def refuse_windows(raw: Mapping[str, Any]) -> None:
    """Refuse layers that see less than all positions before them."""
    kinds = raw.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise _unsupported(raw, f"layer_types = {shown(kinds)}")


def sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    """Return the dimensions, those of grouped-query attention with rotary positions included."""
    found = {name: size(raw, name) for name in SIZES}
    filled = {**raw, "head_dim": head_dim(raw), "num_key_value_heads": num_key_value_heads(raw)}
    found["head_dim"] = size(filled, "head_dim", MAX_HEAD_DIM)
    found["num_key_value_heads"] = size(filled, "num_key_value_heads")
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        raise ValueError(
            f"{found['num_attention_heads']} query heads do not divide among "
            f"{found['num_key_value_heads']} key-value heads"
        )
    if found["head_dim"] % 2:
        raise ValueError(f"head_dim {found['head_dim']} is odd: rotary positions need pairs")
    return found


def size(raw: Mapping[str, Any], name: str, limit: int = MAX_SIZE) -> int:
    """Return a dimension, at most *limit*."""
    value: Any = raw.get(name)
    if type(value) is not int or not 0 < value <= limit:
        raise ValueError(f"config.json's {name} is {shown(value)}, which is no size of a model")
    return int(value)


def positive(raw: Mapping[str, Any], name: str) -> float:
    """Return a number above zero."""
    value: Any = raw.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_NUMBER:
        raise ValueError(f"config.json's {name} is {shown(value)}, which is no positive number")
    return float(value)


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """Return a boolean."""
    value = raw.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"config.json's {name} is {shown(value)}, neither true nor false")  # noqa: TRY004 - as above
    return value


def rope_theta(raw: Mapping[str, Any]) -> float:
    """Return the base frequency, as transformers 5 (``rope_parameters``) or 4 writes it."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"the rotary positions {shown(rope)} are no object")  # noqa: TRY004 - config.json is the value
    kind = rope.get("rope_type", rope.get("type", "default"))
    by_layer = any(isinstance(value, Mapping) for value in rope.values())
    if kind != "default" or by_layer or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported(raw, f"the rotary positions {shown(dict(rope))}")
    top = 10000.0 if raw.get("rope_theta") is None else raw["rope_theta"]
    return positive({"rope_theta": top, **rope}, "rope_theta")


def _unsupported(raw: Mapping[str, Any], what: str) -> ValueError:
    return ValueError(f"{raw.get('model_type', 'a model')} with {what} is not supported")
