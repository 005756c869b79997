"""The configuration inside a GGUF file, under the names config.json uses.

GGUF writes ``<architecture>.embedding_length`` where config.json writes ``hidden_size``. What a
GGUF can say and config.json cannot (or says elsewhere) becomes the key that an architecture's
``Config.from_json`` refuses or reads, so that nothing in a file is passed over.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import open_file
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.tensors import TensorInfo

HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
"""Those with recurrent layers, whose rows GGUF files order otherwise; so they keep their names."""

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    **{name: name for name in HYBRIDS},
}
"""The architectures whose keys mean what is said here, and their names in config.json."""

MIXTURES = ("qwen3moe", "qwen3next", "qwen35moe")
"""Those of them that are mixtures of experts."""

STATES = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
DRAFTING = "nextn_predict_layers"

INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
FACTORS = "rope_freqs.weight"
"""The tensor by which a GGUF file slows rotary positions down, pair by pair, as Llama 3 does."""

MAX_FACTORS = 1 << 12
SOFTMAX_GATING = 1
SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
}
END_TOKENS = ("eos", "eot", "eom")


def config_of(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that would describe *file*; raises CheckpointError."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f"{file.path}: general.architecture is missing")
    if architecture not in MODEL_TYPES:
        return {"model_type": architecture}  # what its keys mean we cannot say
    values = _Values(file, architecture)
    dimensions = _dimensions(values)
    return {
        "model_type": _model_type(values),
        **dimensions,
        **_rotary(values),
        **_experts(values),
        **_states(values, dimensions["num_hidden_layers"]),
        **_variant(values),
    }


def _model_type(values: _Values) -> str:
    """Return our name of the architecture; Qwen3-Next's first files had rows as the checkpoint."""
    is_first = any(name.endswith(".ssm_in.weight") for name in values.file.tensors)
    if values.architecture == "qwen3next" and is_first:
        return "qwen3_next"
    return MODEL_TYPES[values.architecture]


def of_text(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json whose text half is an object in it as that of the text alone."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {name: value for name, value in config.items() if name not in PARTS}
    inner = {name: value for name, value in text.items() if name not in outer or name != TIED}
    return {**outer, **inner}


PARTS = ("text_config", "vision_config")
TIED = "tie_word_embeddings"
"""Of the whole model, which goes before what its text half says."""


class _Values:
    """The metadata of one architecture, with errors in words."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            self._refuse(key, value, "a positive whole number")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not float or not 0 < value < math.inf:
            self._refuse(key, value, "a positive number")
        return float(value)

    def _refuse(self, key: str, value: Any, wanted: str) -> None:
        state = "is missing" if value is None else f"is {shown(value)}, not {wanted}"
        raise CheckpointError(f"{self.file.path}: {self.architecture}.{key} {state}")


def _dimensions(values: _Values) -> dict[str, Any]:
    without = {"intermediate_size": values.get("expert_feed_forward_length")}
    sizes = {name: values.integer(key, without.get(name)) for name, key in INTEGERS.items()}
    heads = sizes["num_attention_heads"]
    if values.architecture in HYBRIDS and values.get(DRAFTING):
        sizes["num_hidden_layers"] -= values.integer(DRAFTING)
    return {
        **sizes,
        "num_key_value_heads": _kv_heads(values, heads),
        "head_dim": _head_dim(values),
        "vocab_size": _vocab_size(values),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
    }


def _kv_heads(values: _Values, heads: int) -> int:
    """Return the number of key-value heads; hybrids may say it layer by layer, where none are 0."""
    key = "attention.head_count_kv"
    said = values.get(key)
    if values.architecture in HYBRIDS and isinstance(said, list):
        first, *others = [count for count in said if count != 0] or [0]
        if type(first) is int and first > 0 and all(count == first for count in others):
            return int(first)
    return values.integer(key, heads)


def _head_dim(values: _Values) -> int:
    hidden, heads = values.integer("embedding_length"), values.integer("attention.head_count")
    return values.integer("attention.key_length", hidden // heads or None)


def _rotary(values: _Values) -> dict[str, Any]:
    head_dim = _head_dim(values)
    found = {
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": values.integer("rope.dimension_count", head_dim) / head_dim,
    }
    scaling = _scaling(values)
    return {**found, "rope_scaling": scaling} if scaling else found


def _scaling(values: _Values) -> dict[str, Any] | None:
    """Return how rotary positions are scaled, as config.json writes it; without a type linearly."""
    kind = values.get("rope.scaling.type")
    factor = values.get("rope.scaling.factor") or values.get("rope.scale_linear")
    is_plain = kind == "none" or (kind in (None, "linear") and not factor)
    if FACTORS in values.file.tensors:
        factors = _floats(values.file.tensors[FACTORS])
        return {"rope_type": "factors" if is_plain else f"{kind} with factors", "factors": factors}
    if is_plain:
        return None
    if kind == "yarn":
        return _yarn(values)
    return {"rope_type": kind or "linear", "factor": factor}


def _yarn(values: _Values) -> dict[str, Any]:
    """Return YaRN's values; llama.cpp takes the paper's magnitude and attn_factor times it."""
    key = "rope.scaling"
    factor = values.number(f"{key}.factor")
    paper = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    magnitude = values.number(f"{key}.yarn_attn_factor", paper)
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": magnitude * values.number(f"{key}.attn_factor", 1.0),
        "beta_fast": values.number(f"{key}.yarn_beta_fast", 32.0),
        "beta_slow": values.number(f"{key}.yarn_beta_slow", 1.0),
    }
    if values.get(f"{key}.original_context_length") is not None:
        found["original_max_position_embeddings"] = values.integer(f"{key}.original_context_length")
    if values.get(f"{key}.yarn_ext_factor") not in (None, -1.0):  # which is llama.cpp's none
        found["extrapolation_factor"] = values.get(f"{key}.yarn_ext_factor")
    if values.get(f"{key}.yarn_log_multiplier"):
        found["rope_type"] = "yarn with yarn_log_multiplier"
    return found


def _floats(tensor: TensorInfo) -> list[float]:
    """Read a small vector."""
    if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_FACTORS:
        raise CheckpointError(
            f"{tensor.path}: tensor {shown(tensor.name)} is no vector of at most {MAX_FACTORS} "
            "float32 numbers"
        )
    with naming(tensor.path), open_file(tensor.path) as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise CheckpointError(f"{tensor.path}: the file ended within {shown(tensor.name)}")
    return list(struct.unpack(f"<{tensor.shape[0]}f", data))


def _experts(values: _Values) -> dict[str, Any]:
    if not values.get("expert_count"):
        return {}
    found: dict[str, Any] = {"num_local_experts": values.integer("expert_count")}
    if values.architecture not in MIXTURES:
        return found  # which says no more that is known here
    found["num_experts_per_tok"] = values.integer("expert_used_count")
    found["moe_intermediate_size"] = values.integer("expert_feed_forward_length")
    found["norm_topk_prob"] = True  # llama.cpp does it whatever the file says
    shared = "expert_shared_feed_forward_length"
    if values.get(shared):
        found["shared_expert_intermediate_size"] = values.integer(shared)
    if values.get("expert_gating_func") not in (None, SOFTMAX_GATING):
        found["scoring_func"] = f"gating function {shown(values.get('expert_gating_func'))}"
    if values.get("expert_weights_scale") not in (None, 0.0, 1.0):
        found["routed_scaling_factor"] = values.get("expert_weights_scale")
    return found


def _states(values: _Values, layers: int) -> dict[str, Any]:
    if values.architecture not in HYBRIDS:
        return {}
    sizes = {name: values.integer(key) for name, key in STATES.items()}
    value_dim = values.integer("ssm.inner_size") // sizes["linear_num_value_heads"]
    found: dict[str, Any] = {**sizes, "linear_value_head_dim": value_dim}
    have_states = values.get("attention.recurrent_layers")
    if isinstance(have_states, list):  # which llama.cpp asks first
        kinds = ("full_attention", "linear_attention")
        found["layer_types"] = [kinds[bool(has_state)] for has_state in have_states[:layers]]
    found["full_attention_interval"] = values.integer("full_attention_interval", 4)
    return found


def _variant(values: _Values) -> dict[str, Any]:
    names = values.file.tensors
    found: dict[str, Any] = {
        "hidden_act": "silu",
        "mlp_bias": any(name.endswith("ffn_down.bias") for name in names),
        "tie_word_embeddings": "output.weight" not in names,
    }
    if values.architecture != "qwen2":  # which has a bias there always, and no such key
        found["attention_bias"] = any(name.endswith("attn_q.bias") for name in names)
    if values.get("attention.sliding_window"):
        found["sliding_window"] = values.get("attention.sliding_window")
        found["use_sliding_window"] = True
    if values.get("attention.value_length") not in (None, values.get("attention.key_length")):
        found["v_head_dim"] = values.get("attention.value_length")
    return found


def _vocab_size(values: _Values) -> int:
    embedding = values.file.tensors.get("token_embd.weight")
    tokens = values.file.metadata.get("tokenizer.ggml.tokens")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    return values.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None)


def generation_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a GGUF file says of generation, under generation_config.json's names."""
    found = {name: metadata[key] for name, key in SAMPLING.items() if key in metadata}
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in END_TOKENS]
    end_ids = list(dict.fromkeys(token for token in ends if type(token) is int))
    if end_ids:
        found["eos_token_id"] = end_ids
    for name, key in {"bos_token_id": "bos", "pad_token_id": "padding"}.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            found[name] = token
    return found
