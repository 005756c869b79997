"""Values out of a config.json, which is not trusted: what is no value of a model is a ValueError.

The names are those of config.json; what a key means where it is absent is the architecture's to
say, except what ``checkpoints.sizes`` must know without torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from cortex.models.checkpoints.errors import shown
from cortex.models.checkpoints.sizes import head_dim, implied, num_key_value_heads
from cortex.models.gated_delta_net import DeltaShape
from cortex.models.mixture import MixtureShape
from cortex.models.rope import Factors, Linear, Llama3, Rope, Scaling, Yarn

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
MAX_LAYERS = 1 << 14
MAX_KERNEL = 16  # tokens that a convolution sees
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


def mixture(raw: Mapping[str, Any]) -> MixtureShape:
    """Return the experts of a layer; with ``shared_expert_intermediate_size`` one is shared."""
    experts = size(raw, "num_local_experts" if raw.get("num_local_experts") else "num_experts")
    per_token = size(raw, "num_experts_per_tok")
    if per_token > experts:
        raise ValueError(f"{per_token} experts per token, but there are only {experts}")
    shared = "shared_expert_intermediate_size"
    return MixtureShape(
        experts,
        per_token,
        size(raw, "moe_intermediate_size"),
        flag(raw, "norm_topk_prob"),
        size(raw, shared) if raw.get(shared) else 0,
    )


def dense_layers(raw: Mapping[str, Any]) -> frozenset[int]:
    """Return the layers of a mixture that have a plain SwiGLU all the same."""
    layers, step = size(raw, "num_hidden_layers", MAX_LAYERS), size(raw, "decoder_sparse_step")
    named = raw.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(type(index) is not int for index in named):
        raise ValueError(f"config.json's mlp_only_layers is {shown(named)}, no list of layers")
    return frozenset(named) | frozenset(i for i in range(layers) if (i + 1) % step)


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


def attention_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which layers of a hybrid attend, of all of them the last of every few if not named."""
    layers = size(raw, "num_hidden_layers")
    kinds = raw.get("layer_types")
    if kinds is None:
        interval = size(implied(raw), "full_attention_interval")
        found = tuple(range(interval - 1, layers, interval))
    elif not isinstance(kinds, list) or len(kinds) != layers or any(k not in KINDS for k in kinds):
        raise ValueError(f"config.json's layer_types is {shown(kinds)}, no {layers} of {KINDS}")
    else:
        found = tuple(index for index, kind in enumerate(kinds) if kind == KINDS[0])
    if not found:
        raise _unsupported(raw, "no layer that attends")
    return found


KINDS = ("full_attention", "linear_attention")
"""What layers of a hybrid are called."""


def delta_net(raw: Mapping[str, Any], **order: bool) -> DeltaShape:
    """Return the sizes of the layers with a recurrent state, whose rows have that *order*."""
    raw = implied(raw)
    keys, values = (size(raw, f"linear_num_{kind}_heads") for kind in ("key", "value"))
    if values % keys:
        raise ValueError(f"{values} value heads do not divide among {keys} key heads")
    key_dim, value_dim = (
        size(raw, f"linear_{kind}_head_dim", MAX_HEAD_DIM) for kind in ("key", "value")
    )
    kernel = size(raw, "linear_conv_kernel_dim", MAX_KERNEL)
    if kernel == 1:
        raise _unsupported(raw, "linear_conv_kernel_dim = 1")
    return DeltaShape(keys, values, key_dim, value_dim, kernel, **order)


def rope(raw: Mapping[str, Any], *, has_partial: bool = False) -> Rope:
    """Return the rotary positions, as transformers 5 (``rope_parameters``) or 4 writes them.

    A key within that object goes before its namesake outside, as in transformers. Where the
    architecture *has_partial* rotation, only the first ``partial_rotary_factor`` of a head turns.
    """
    inner = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"the rotary positions {shown(inner)} are no object")  # noqa: TRY004 - config.json is the value
    if any(isinstance(value, Mapping) for value in inner.values()):
        raise _unsupported(raw, f"the rotary positions {shown(dict(inner))}")
    found = _Rotary({**DEFAULT_ROTARY, **_given(raw, ROTARY), **_given(inner, inner)}, raw)
    return Rope(found.dim(has_partial=has_partial), found.number("rope_theta"), found.scaling())


DEFAULT_ROTARY = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
ROTARY = (
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
)
"""What of the rotary positions may stand outside of their object."""


class _Rotary:
    """The values of the rotary positions, all in one object."""

    def __init__(self, values: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
        self.values = values
        self.raw = raw
        self.number = partial(positive, values)

    def dim(self, *, has_partial: bool) -> int:
        share = self.number("partial_rotary_factor")
        if share > 1 or (share < 1 and not has_partial):
            raise _unsupported(self.raw, f"partial_rotary_factor = {share}")
        dim = int(head_dim(self.raw) * share + 1e-6)  # 100 * 0.58 is less than 58
        if dim < 2 or dim % 2:
            raise ValueError(f"{dim} elements of a head turn: rotary positions need pairs")
        return dim

    def scaling(self) -> Scaling | None:
        kind = self.values.get("rope_type", self.values.get("type", "default"))  # new or old name
        match kind:
            case "default":
                return None
            case "linear":
                return Linear(self.number("factor"))
            case "factors":
                return self.factors()
            case "llama3":
                return self.llama3()
            case "yarn":
                return self.yarn()
            case _:
                raise _unsupported(self.raw, f"rotary positions of the type {shown(kind)}")

    def factors(self) -> Factors:
        values = self.values.get("factors")
        pairs = self.dim(has_partial=True) // 2
        if not isinstance(values, list) or len(values) != pairs:
            raise ValueError(f"the factors of {pairs} rotary pairs are {shown(values)}")
        return Factors(tuple(positive({"factors": value}, "factors") for value in values))

    def original_tokens(self) -> int:
        name = "original_max_position_embeddings"
        return size(self.values, name if name in self.values else "max_position_embeddings")

    def llama3(self) -> Llama3:
        low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
        if low >= high:
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")
        return Llama3(self.number("factor"), low, high, self.original_tokens())

    def yarn(self) -> Yarn:
        if self.number("rope_theta") <= 1:
            raise ValueError("YaRN needs a rope_theta above 1")
        if self.values.get("extrapolation_factor", 1.0) != 1.0:
            raise _unsupported(
                self.raw, f"extrapolation_factor = {shown(self.values['extrapolation_factor'])}"
            )
        original = self.original_tokens()
        given = {"factor": size(self.values, "max_position_embeddings") / original, **self.values}
        factor = positive(given, "factor")
        return Yarn(
            factor,
            original,
            self.magnitude(factor),
            positive({"beta_fast": 32.0, **self.values}, "beta_fast"),
            positive({"beta_slow": 1.0, **self.values}, "beta_slow"),
            flag({"truncate": True, **self.values}, "truncate"),
        )

    def magnitude(self, factor: float) -> float:
        """Return how much YaRN lets queries and keys grow, unless told otherwise as its paper."""
        if "attention_factor" in self.values:
            return self.number("attention_factor")
        if self.values.get("mscale") and self.values.get("mscale_all_dim"):
            return _growth(factor, self.number("mscale")) / _growth(
                factor, self.number("mscale_all_dim")
            )
        return _growth(factor, 1.0)


def _growth(factor: float, rate: float) -> float:
    return 0.1 * rate * math.log(factor) + 1.0 if factor > 1 else 1.0


def _given(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return those of *names* that have a value: null is none."""
    return {name: values[name] for name in names if values.get(name) is not None}


def _unsupported(raw: Mapping[str, Any], what: str) -> ValueError:
    return ValueError(f"{raw.get('model_type', 'a model')} with {what} is not supported")
