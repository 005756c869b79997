"""Tensor names of both formats, brought to those of the architectures' parameters.

Ours are those of safetensors checkpoints without the leading ``model.``, or in models that also see
images without ``model.language_model.``; GGUF has short ones.
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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
GGUF_VECTORS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
"""Parameters of a layer whose names end otherwise."""

OTHER_TOWERS = ("model.visual.", "visual.", "mtp.", "model.mtp.")
"""What a model of text alone leaves in the file: eyes, and layers that draft tokens."""


def parameter_name(name: str, file_format: str) -> str:
    """Return our name of a file's tensor; one we have no word for keeps its own."""
    if file_format != "gguf":
        return name.removeprefix("model.").removeprefix("language_model.")
    match name.split("."):
        case ["blk", layer, *words] if ".".join(words) in GGUF_VECTORS:
            return f"layers.{layer}.{GGUF_VECTORS['.'.join(words)]}"
        case ["blk", layer, word, kind] if word in GGUF_NAMES:
            return f"layers.{layer}.{GGUF_NAMES[word]}.{kind}"
        case [word, kind] if word in GGUF_NAMES:
            return f"{GGUF_NAMES[word]}.{kind}"
        case _:
            return name


def is_of_layer_from(name: str, layers: int) -> bool:
    """Whether a GGUF tensor is of a layer behind the first *layers*."""
    match name.split("."):
        case ["blk", layer, *_] if layer.isdecimal():
            return int(layer) >= layers
        case _:
            return False


def is_derived(name: str) -> bool:
    """Whether this tensor of a file is no weight: the configuration holds what it says.

    Old checkpoints carry the rotary frequencies; GGUF files those factors of theirs that
    ``config`` reads.
    """
    return name.endswith(".rotary_emb.inv_freq") or name == "rope_freqs.weight"
