"""Llama (Touvron et al., arXiv:2302.13971), with grouped queries (Llama 2, arXiv:2307.09288).

A pre-norm transformer with rotary positions and no bias anywhere. SmolLM2 and the first Mistral
have the same shape.

    h = x + Attention(RMSNorm(x))
    y = h + SwiGLU(RMSNorm(h))

Shapes, here and below: T tokens of all sequences in the batch laid end to end, R of them with
logits wanted, H hidden size, N query heads, K key-value heads, D head size, V vocabulary.

Source: huggingface/transformers, models/llama/modeling_llama.py; parameter names are those of the
checkpoint without its leading ``model.``, so loading needs no table beyond ``FUSED``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cortex.models.attention import PagedAttention
from cortex.models.batch import Batch
from cortex.models.layers import RMSNorm, SwiGLU, add
from cortex.models.linear import ColumnParallel, Embedding, RowParallel
from cortex.models.rope import Rotary, Rotation, rotate

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Parameters we store as one matrix, and the checkpoint tensors they are stacked from."""

GGUF_PAIRED = ("q_proj", "k_proj")
"""Projections whose rows a GGUF file orders in rotary pairs instead of halves."""

ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "num_local_experts": (None,),
    "sliding_window": (None,),
    "v_head_dim": (None,),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}
"""Keys of config.json that make another model of it, and the values implemented here."""

DEFAULTS = {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
"""What transformers takes where config.json is silent."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
MAX_SIZE = 1 << 24  # no dimension of a real model is near; a damaged header's may be beyond


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The part of config.json this file reads, under the same names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Read config.json; raise ValueError for a variant this file does not implement."""
        raw = {**DEFAULTS, **raw}
        for name, values in ONLY.items():
            if raw.get(name) not in values:
                raise ValueError(f"llama with {name} = {raw[name]!r} is not supported")
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = raw.get("num_attention_heads")
        if raw.get("head_dim") is None:
            raw["head_dim"] = _size(raw, "hidden_size") // _size(raw, "num_attention_heads")
        config = cls(
            **{name: _size(raw, name) for name in SIZES},
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=_rope_theta(raw),
            tie_word_embeddings=bool(raw["tie_word_embeddings"]),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(
                f"{config.num_attention_heads} query heads do not divide among "
                f"{config.num_key_value_heads} key-value heads"
            )
        if config.head_dim % 2:
            raise ValueError(f"head_dim {config.head_dim} is odd: rotary positions need pairs")
        return config


def _size(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise ValueError(f"config.json's {name} is {value!r}, which is no size of a model")
    return value


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """Read the base frequency as transformers 5 (``rope_parameters``) or 4 writes it."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"the rotary positions {rope!r} are no object")  # noqa: TRY004 - see from_json
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"llama with the rotary positions {dict(rope)} is not supported")
    theta = float(rope.get("rope_theta", raw.get("rope_theta") or 10000.0))
    if not 0 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta}")
    return theta


class Llama(nn.Module):
    """Token ids in, logits of the tokens we sample from out."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = ColumnParallel(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [R, V], float32, of the tokens named by ``batch.sampled``."""
        x = self.embed_tokens(batch.token_ids)  # [T, H]
        rotation = self.rotary(batch.positions)
        for layer in self.layers:
            x = layer(x, rotation, batch)
        return self.lm_head(self.norm(x[batch.sampled])).float()


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]."""
        h = add(x, self.self_attn(self.input_layernorm(x), rotation, batch))
        return add(h, self.mlp(self.post_attention_layernorm(h)))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.n, self.k = config.num_attention_heads, config.num_key_value_heads
        self.d = config.head_dim
        self.qkv_proj = ColumnParallel(config.hidden_size, (self.n + 2 * self.k) * self.d)
        self.o_proj = RowParallel(self.n * self.d, config.hidden_size)
        self.attend = PagedAttention(layer=index, scale=self.d**-0.5)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]; writes this layer's keys and values into the cache of *batch*."""
        qkv = self.qkv_proj(x).unflatten(-1, (self.n + 2 * self.k, self.d))
        q, k, v = qkv.split([self.n, self.k, self.k], dim=-2)  # [T, N, D], [T, K, D] twice
        q, k = rotate(q, rotation), rotate(k, rotation)
        return self.o_proj(self.attend(q, k, v, batch).flatten(-2))
