"""Qwen3.5, dense (Qwen team): a hybrid of Gated DeltaNet and attention; its text half.

Of every few layers the last attends to all tokens, with an output gate and few rotary elements; the
others keep a state of fixed size.

    h = x + Mixer(RMSNorm(x))        GatedDeltaNet, in every fourth layer GatedAttention
    y = h + SwiGLU(RMSNorm(h))

All norms but that within GatedDeltaNet are centred on zero in a checkpoint. The vision tower
(``model.visual.*``) and the layers that draft tokens (``mtp.*``) are not loaded: here are neither
images nor drafts. Text has the same position in all three dimensions of the rotary embedding, which
then is the usual one.

Shapes, here and below: T tokens of all sequences in the batch laid end to end, R of them with
logits wanted, H hidden size, V vocabulary.

Source: huggingface/transformers, models/qwen3_5/modeling_qwen3_5.py; parameter names are those of
the checkpoint without its leading ``model.language_model.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cortex.models.batch import Batch, CacheShape
from cortex.models.config_values import (
    attention_layers,
    delta_net,
    flag,
    positive,
    refuse_other,
    rope,
    sizes,
)
from cortex.models.gated_attention import AttentionShape, GatedAttention
from cortex.models.gated_delta_net import DeltaShape, GatedDeltaNet
from cortex.models.layers import Decoder, RMSNorm, SwiGLU, add, take
from cortex.models.linear import Embedding, Head
from cortex.models.parallel import ALONE, Group
from cortex.models.rope import Rope, Rotary, Rotation

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Parameters we store as one matrix, and the checkpoint tensors they are stacked from."""

GGUF_PAIRED = ()
"""GGUF files of Qwen3.5 have queries and keys where the checkpoint has them."""

ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attn_output_gate": (True, None),
    "v_head_dim": (None,),
    "quantization_config": (None,),
}
"""Keys of config.json that make another model of it, and the values implemented here."""

DEFAULTS = {
    "model_type": "qwen3_5_text",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.25,
}
"""What transformers takes where config.json is silent."""

TILED = "qwen35"
"""What GGUF calls it, whose files order the value heads in tiles."""


@dataclass(frozen=True, slots=True)
class Qwen35Config:
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
    delta_net: DeltaShape
    attention_layers: tuple[int, ...]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Qwen35Config:
        """Read config.json; raise ValueError for a variant this file does not implement."""
        raw = {**DEFAULTS, **raw}
        refuse_other(raw, ONLY)
        return cls(
            **sizes(raw),
            rms_norm_eps=positive(raw, "rms_norm_eps"),
            rope=rope(raw, has_partial=True),
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            delta_net=delta_net(raw, is_tiled=raw["model_type"] == TILED),
            attention_layers=attention_layers(raw),
        )

    @property
    def attention(self) -> AttentionShape:
        """The sizes of the layers that attend."""
        return AttentionShape(
            self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.rms_norm_eps
        )


class Qwen35(Decoder):
    """Token ids in, logits of the tokens we sample from out."""

    def __init__(self, config: Qwen35Config, dtype: torch.dtype, group: Group = ALONE) -> None:
        super().__init__()
        attending = len(config.attention_layers)
        self.caches = CacheShape(
            attending,
            group.count(config.num_key_value_heads),
            config.head_dim,
            config.delta_net.state(config.num_hidden_layers - attending, group),
        )
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, group)
        self.rotary = Rotary(config.rope)
        self.layers = nn.ModuleList(
            Layer(config, i, group) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, is_centred=True)
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
    """One block: a mixer of tokens, then a SwiGLU."""

    def __init__(self, config: Qwen35Config, index: int, group: Group) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attends = index in config.attention_layers
        attending = sum(layer < index for layer in config.attention_layers)
        self.input_layernorm = RMSNorm(size, eps, is_centred=True)
        if self.attends:
            self.self_attn = GatedAttention(size, config.attention, attending, group)
        else:
            self.linear_attn = GatedDeltaNet(size, config.delta_net, index - attending, eps, group)
        self.post_attention_layernorm = RMSNorm(size, eps, is_centred=True)
        self.mlp = SwiGLU(size, config.intermediate_size, group)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]."""
        normed = self.input_layernorm(x)
        mixed = (
            self.self_attn(normed, rotation, batch)
            if self.attends
            else self.linear_attn(normed, batch)
        )
        h, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return add(h, self.mlp(normed))
