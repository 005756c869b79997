"""Tensor names of both formats, brought to those of the architectures' parameters.

Ours are those of safetensors checkpoints without the leading ``model.``; GGUF has short ones.
"""

from __future__ import annotations

GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def parameter_name(name: str, file_format: str) -> str:
    """Return our name of a file's tensor; one we have no word for keeps its own."""
    if file_format != "gguf":
        return name.removeprefix("model.")
    match name.split("."):
        case ["blk", layer, word, kind] if word in GGUF_NAMES:
            return f"layers.{layer}.{GGUF_NAMES[word]}.{kind}"
        case [word, kind] if word in GGUF_NAMES:
            return f"{GGUF_NAMES[word]}.{kind}"
        case _:
            return name


def is_derived(name: str) -> bool:
    """Whether an old checkpoint carries this tensor although config.json determines it."""
    return name.endswith(".rotary_emb.inv_freq")
