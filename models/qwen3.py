"""Qwen3, dense (Qwen team, arXiv:2505.09388).

A pre-norm transformer with grouped-query attention. It differs from Llama in one thing: queries
and keys pass through an RMSNorm per head before they are rotated.

    h = x + Attention(RMSNorm(x))        q, k = rotate(RMSNorm(W x))
    y = h + SwiGLU(RMSNorm(h))

Shapes, here and below: T tokens of all sequences in the batch laid end to end, R of them with
logits wanted, H hidden size, N query heads, K key-value heads, D head size, V vocabulary.

Source: huggingface/transformers, models/qwen3/modeling_qwen3.py; parameter names are those of the
checkpoint without its leading ``model.``, so loading needs no table beyond ``FUSED``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cortex.models.attention import PagedAttention
from cortex.models.batch import Batch, CacheShape
from cortex.models.config_values import (
    flag,
    positive,
    refuse_other,
    refuse_windows,
    rope,
    sizes,
)
from cortex.models.layers import Decoder, RMSNorm, SwiGLU, add, take
from cortex.models.linear import ColumnParallel, Embedding, Head, RowParallel
from cortex.models.parallel import ALONE, Group
from cortex.models.rope import Rope, Rotary, Rotation

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Parameters we store as one matrix, and the checkpoint tensors they are stacked from."""

GGUF_PAIRED = ()
"""GGUF files of Qwen3 keep every row where the checkpoint has it."""

ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False,),
    "num_local_experts": (None,),
    "v_head_dim": (None,),
    "quantization_config": (None,),
}
"""Keys of config.json that make another model of it, and the values implemented here."""

DEFAULTS = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
"""What transformers takes where config.json is silent."""


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """The part of config.json this file reads, under the same names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Qwen3Config:
        """Read config.json; raise ValueError for a variant this file does not implement."""
        raw = {**DEFAULTS, **raw}
        refuse_other(raw, ONLY)
        refuse_windows(raw)
        return cls(
            **sizes(raw),
            rms_norm_eps=positive(raw, "rms_norm_eps"),
            rope=rope(raw),
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        )


class Qwen3(Decoder):
    """Token ids in, logits of the tokens we sample from out."""

    def __init__(self, config: Qwen3Config, dtype: torch.dtype, group: Group = ALONE) -> None:
        super().__init__()
        kv_heads = group.count(config.num_key_value_heads)
        self.caches = CacheShape(config.num_hidden_layers, kv_heads, config.head_dim)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, group)
        self.rotary = Rotary(config.rope)
        self.layers = nn.ModuleList(
            Layer(config, i, group) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, group)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [R, V], float32, of the tokens named by ``batch.sampled``."""
        return self.lm_head(self.norm(take(self._blocks(batch), batch.sampled))).float()

    def hidden(self, batch: Batch) -> Tensor:
        """Return what the head would see of every token, [T, H] float32: embeddings pool it."""
        return self.norm(self._blocks(batch)).float()

    def _blocks(self, batch: Batch) -> Tensor:
        """Return the residual stream [T, H] behind the last block."""
        x = self.embed_tokens(batch.token_ids)  # [T, H]
        rotation = self.rotary(batch.positions)
        for layer in self.layers:
            x = layer(x, rotation, batch)
        return x


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: Qwen3Config, index: int, group: Group) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, group)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]."""
        h, normed = self.post_attention_layernorm.of_sum(
            x, self.self_attn(self.input_layernorm(x), rotation, batch)
        )
        return add(h, self.mlp(normed))


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys and rotary positions."""

    def __init__(self, config: Qwen3Config, index: int, group: Group) -> None:
        super().__init__()
        heads, kv_heads, self.d = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.n, self.k = heads // group.ranks, group.count(kv_heads)
        query, kv = group.query_heads(heads, self.d), group.heads(kv_heads, self.d)
        self.qkv_proj = ColumnParallel(config.hidden_size, query, kv, kv)
        self.o_proj = RowParallel(query, config.hidden_size, group=group)
        self.q_norm = RMSNorm(self.d, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.d, config.rms_norm_eps)
        self.attend = PagedAttention(layer=index, scale=self.d**-0.5)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]; writes this layer's keys and values into the cache of *batch*."""
        qkv = self.qkv_proj(x).unflatten(-1, (self.n + 2 * self.k, self.d))
        q, k, v = qkv.split([self.n, self.k, self.k], dim=-2)  # [T, N, D], [T, K, D] twice
        q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(self.attend(q, k, v, rotation, batch).flatten(-2))
