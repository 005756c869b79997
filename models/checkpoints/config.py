"""The configuration inside a GGUF file, under the names config.json uses.

GGUF writes ``<architecture>.embedding_length`` where config.json writes ``hidden_size``. What a
GGUF can say and config.json cannot (or says elsewhere) becomes the key that an architecture's
``Config.from_json`` refuses or reads, so that nothing in a file is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cortex.models.checkpoints.errors import CheckpointError, shown
from cortex.models.checkpoints.gguf import GGUFFile

READ = ("llama", "qwen2", "qwen3")
"""The architectures whose keys mean what is said here."""

INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
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
    if architecture not in READ:
        return {"model_type": architecture}  # what its keys mean we cannot say
    values = _Values(file, architecture)
    return {"model_type": architecture, **_dimensions(values), **_variant(values)}


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
    sizes = {name: values.integer(key) for name, key in INTEGERS.items()}
    heads = sizes["num_attention_heads"]
    head_dim = values.integer("attention.key_length", sizes["hidden_size"] // heads or None)
    return {
        **sizes,
        "num_key_value_heads": values.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _vocab_size(values),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": values.integer("rope.dimension_count", head_dim) / head_dim,
    }


def _variant(values: _Values) -> dict[str, Any]:
    names = values.file.tensors
    found: dict[str, Any] = {
        "hidden_act": "silu",
        "mlp_bias": any(name.endswith("ffn_down.bias") for name in names),
        "tie_word_embeddings": "output.weight" not in names,
    }
    if values.architecture != "qwen2":  # which has a bias there always, and no such key
        found["attention_bias"] = any(name.endswith("attn_q.bias") for name in names)
    if values.get("expert_count"):
        found["num_local_experts"] = values.get("expert_count")
    if values.get("attention.sliding_window"):
        found["sliding_window"] = values.get("attention.sliding_window")
        found["use_sliding_window"] = True
    if values.get("attention.value_length") not in (None, values.get("attention.key_length")):
        found["v_head_dim"] = values.get("attention.value_length")
    scaling = values.get("rope.scaling.type")
    if "rope_freqs.weight" in names:
        scaling = "llama3"  # how llama.cpp's converter writes Llama 3.1's frequency scaling
    if scaling not in (None, "none"):
        found["rope_scaling"] = {"rope_type": scaling}
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
