"""A whole tiny llama as safetensors, with random weights, a tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fake_node import CHATML
from tiny_repo import CONFIG, described

CONTEXT_TOKENS = 256


def write_checkpoint(directory: Path, template: str = CHATML, **sizes: int) -> Path:
    """Write the model into *directory*, which need not exist, and return that.

    *sizes* are values of its config.json; a key-value head is for two heads.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in described().items():
        (directory / name).write_bytes(content)
    config = {**CONFIG, "max_position_embeddings": CONTEXT_TOKENS, **sizes}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}), encoding="utf-8"
    )
    draw = np.random.default_rng(7)
    tensors = {
        name: draw.normal(size=shape).astype(np.float32) for name, shape in _shapes(config).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary, layers = (
        int(config[name])
        for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        **{
            f"model.layers.{index}.{name}.weight": shape
            for index in range(layers)
            for name, shape in layer.items()
        },
    }
