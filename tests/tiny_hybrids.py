"""Tiny hybrids of attention and Gated DeltaNet, and GGUF files of them as llama.cpp has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tiny_models import GGUF_LAYER_NAMES, GGUF_NAMES, random_model, saved_model

HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MODEL_TYPES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
GGUF_ARCHITECTURES = {
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_next": "qwen3next",
}
LAYER_NAMES = {
    **GGUF_LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
FLOATS = ("norm", "conv1d", "ffn_gate_inp", "ssm_a", "ssm_dt")
"""What the converter never quantises."""


def hybrid(model_type: str, **overrides: Any) -> dict[str, Any]:
    """Return the sizes of one of ``MODEL_TYPES``."""
    mixture = {} if model_type == "qwen3_5_text" else MIXTURE
    return {**HYBRID, **mixture, **overrides}


JOINED = {"in_proj_qkvz.weight": "ssm_in", "experts.gate_up_proj": "ffn_gate_up_exps"}


def random_hybrid(model_type: str, **overrides: Any) -> Any:
    """Build transformers' model with random weights."""
    return random_model(model_type, **hybrid(model_type, **overrides))


def saved_hybrid(directory: Path, model_type: str, **overrides: Any) -> Any:
    """Build one and save it as safetensors into *directory*."""
    return saved_model(directory, model_type, **hybrid(model_type, **overrides))


def write_hybrid_gguf(
    path: Path, model: Any, kind: str, *, drafting_layers: int = 0, is_joined: bool = False
) -> None:
    """Write transformers' *model* as convert_hf_to_gguf.py does, and round it to what was stored.

    Where it *is_joined*, one tensor holds what other versions and options of that make two of.

    Quantised matrices have blocks of 32; the columns that the converter moves, heads of values,
    are whole numbers of these.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[config.model_type])
    _add_sizes(writer, config, drafting_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        is_whole = is_joined and name.endswith(tuple(JOINED))
        converted = _joined(name, weight, kind) if is_whole else None
        for stored_name, values in (converted or _converted(name, weight, config, kind)).items():
            _add(writer, stored_name, values.numpy(), kind)
    for layer in range(drafting_layers):
        name = f"blk.{config.num_hidden_layers + layer}.nextn.eh_proj.weight"
        writer.add_tensor(name, np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: Any, drafting_layers: int) -> None:
    writer.add_block_count(config.num_hidden_layers + drafting_layers)
    if drafting_layers:
        writer.add_nextn_predict_layers(drafting_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_full_attention_interval(4)
    if config.model_type == "qwen3_5_text":
        writer.add_feed_forward_length(config.intermediate_size)
        return
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _converted(name: str, weight: Tensor, config: Any, kind: str) -> dict[str, Tensor]:
    """Return the tensors that *weight*, which is rounded in place, becomes in the file."""
    if name in GGUF_NAMES:
        is_norm = "norm" in name
        return {GGUF_NAMES[name]: weight + 1 if is_norm else _rounded(weight, kind)}
    _, _, layer, *middle = name.split(".")
    if ".experts." in name:
        return {
            f"blk.{layer}.{word}.weight": _rounded(part, kind)
            for word, part in _experts(middle[-1], weight).items()
        }
    values = _moved(middle, weight, config, kind)
    return {f"blk.{layer}.{word}": values for word, values in values.items()}


def _joined(name: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    word = next(word for tail, word in JOINED.items() if name.endswith(tail))
    return {f"blk.{name.split('.')[2]}.{word}.weight": _rounded(weight, kind)}


def _experts(name: str, weight: Tensor) -> dict[str, Tensor]:
    if name == "down_proj":
        return {"ffn_down_exps": weight}
    gate, up = weight.chunk(2, dim=1)
    return {"ffn_gate_exps": gate, "ffn_up_exps": up}


def _moved(middle: list[str], weight: Tensor, config: Any, kind: str) -> dict[str, Tensor]:
    if middle[0] == "linear_attn":
        small = _small(middle[1], weight, config)
        return small or _projection(middle[1], _rounded(weight, kind), config)
    word = LAYER_NAMES[".".join(middle[:-1])]
    if word == "ffn_gate_inp_shexp":
        return {f"{word}.weight": weight[0]}
    values = weight + 1 if "norm" in word else weight
    return {f"{word}.weight": values if _is_float(word) else _rounded(weight, kind)}


def _small(word: str, weight: Tensor, config: Any) -> dict[str, Tensor]:
    match word:
        case "A_log":
            return {"ssm_a": _tiled(-weight.exp(), config)}
        case "dt_bias":
            return {"ssm_dt.bias": _tiled(weight, config)}
        case "norm":
            return {"ssm_norm.weight": weight}
        case "conv1d":
            return {"ssm_conv1d.weight": _tiled_behind_keys(weight.squeeze(1), config)}
        case _:
            return {}


def _projection(word: str, weight: Tensor, config: Any) -> dict[str, Tensor]:
    if word == "in_proj_qkvz":
        return _ungrouped(weight, config)
    match word:
        case "in_proj_qkv":
            moved = _tiled_behind_keys(weight, config)
        case "out_proj":
            moved = _tiled(weight.T, config).T
        case "in_proj_ba":
            moved = weight
        case _:
            moved = _tiled(weight, config)
    return {f"{LAYER_NAMES[f'linear_attn.{word}']}.weight": moved}


def _ungrouped(weight: Tensor, config: Any) -> dict[str, Tensor]:
    """Per key head [q | k | values | z] to [q | k | v] and z."""
    each = config.linear_num_value_heads // config.linear_num_key_heads
    key, values = config.linear_key_head_dim, each * config.linear_value_head_dim
    groups = weight.view(config.linear_num_key_heads, -1, weight.size(1))
    q, k, v, z = (
        part.flatten(0, 1) for part in torch.split(groups, [key, key, values, values], dim=1)
    )
    return {"attn_qkv.weight": torch.cat([q, k, v]), "attn_gate.weight": z}


def _tiled_behind_keys(rows: Tensor, config: Any) -> Tensor:
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat([rows[:keys], _tiled(rows[keys:], config)])


def _tiled(rows: Tensor, config: Any) -> Tensor:
    """Rows of value heads, those of a key head together: now the first of each key head first."""
    if config.model_type == "qwen3_next":
        return rows
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    heads = rows.reshape(keys, values // keys, rows.size(0) // values, *rows.shape[1:])
    return torch.flatten(heads.transpose(0, 1), 0, 2)


def _is_float(word: str) -> bool:
    return any(name in word for name in FLOATS)


def _rounded(weight: Tensor, kind: str) -> Tensor:
    """Give *weight* the values that *kind* can hold, and return it."""
    stored = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(np.ascontiguousarray(weight.numpy()), stored)
    return weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, stored)))


def _add(writer: Any, name: str, values: Any, kind: str) -> None:
    values = np.ascontiguousarray(values)
    if values.ndim == 1 or _is_float(name):
        writer.add_tensor(name, values)
        return
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
