"""Headers of checkpoints as they were published, of a few layers, over files without content.

A model here is its config.json (or a GGUF file's metadata) and the names, types and shapes of its
tensors, written down from transformers' and llama.cpp's sources and from model cards. Widths are
real: the files are sparse and take no room.

    safetensors    B: BF16, S: F32, Q: F8_E4M3 with ``weight_scale_inv`` beside it
    GGUF           the types that llama-quantize gives each tensor, sizes outermost first
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, tuple[str, tuple[int, ...]]]

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
BLOCK = 128
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


@dataclass(frozen=True)
class Published:
    """One checkpoint: *config* is config.json, or the metadata of a GGUF file."""

    name: str
    config: Mapping[str, Any]
    tensors: Tensors
    left_out: tuple[str, ...] = ()
    """What the names of tensors begin with that a model of text alone has no use for."""
    is_gguf: bool = False
    refused: Mapping[int, str] = field(default_factory=dict)
    """What so many ranks cannot share."""

    def write(self, directory: Path) -> Path:
        """Write it below *directory* and return its path."""
        path = directory / self.name
        if self.is_gguf:
            return _write_gguf(path.with_name(f"{self.name}.gguf"), self)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config))
        names = list(self.tensors)
        weight_map: dict[str, str] = {}
        for number, some in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05}-of-00002.safetensors"
            _write_safetensors(path / file, {name: self.tensors[name] for name in some})
            weight_map |= dict.fromkeys(some, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path


def _write_safetensors(path: Path, tensors: Tensors) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape) in tensors.items():
        begin, end = end, end + prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}  # type: ignore[dict-item]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _write_gguf(path: Path, model: Published) -> Path:
    metadata = dict(model.config)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        _add(writer, key, value)
    total = 0
    for name, (kind, shape) in model.tensors.items():
        stored = gguf.GGMLQuantizationType[kind]
        elements, size = gguf.GGML_QUANT_SIZES[stored]
        nbytes = prod(shape) // elements * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, stored)
        total += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(begin + total)
        file.seek(begin)  # Llama's factors of rotary positions, which come first and are read
        if "rope_freqs.weight" in model.tensors:
            file.write(np.ones(64, np.float32).tobytes())
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case str():
            writer.add_string(key, value)
        case float():
            writer.add_float32(key, value)
        case int():
            writer.add_uint32(key, value)
        case _:
            writer.add_array(key, value)


# -- tensors of safetensors --


def fp8(tensors: Tensors, *parts: str) -> Tensors:
    """Store the matrices whose names have one of *parts* in 8 bits, with their scales."""
    found: Tensors = {}
    for name, (kind, shape) in tensors.items():
        if any(part in name for part in parts) and len(shape) == 2:
            found[name] = ("F8_E4M3", shape)
            blocks = tuple(-(-size // BLOCK) for size in shape)
            found[f"{name}_scale_inv"] = ("BF16", blocks)
        else:
            found[name] = (kind, shape)
    return found


def bf16(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return tensors named *prefix* and their own names."""
    return {prefix + name: ("BF16", shape) for name, shape in shapes.items()}


def matrices(prefix: str, **shapes: tuple[int, ...]) -> Tensors:
    """Return weights of BF16 named *prefix* and their own names."""
    return bf16(prefix, {f"{name}.weight": shape for name, shape in shapes.items()})


def ends(prefix: str, vocab: int, hidden: int, *, is_tied: bool = False) -> Tensors:
    """Return what is before and behind the layers."""
    found = matrices(prefix, embed_tokens=(vocab, hidden), norm=(hidden,))
    return found if is_tied else found | matrices("", lm_head=(vocab, hidden))


def norms(prefix: str, hidden: int) -> Tensors:
    """Return the two norms of a layer."""
    return matrices(prefix, input_layernorm=(hidden,), post_attention_layernorm=(hidden,))


def attention(
    prefix: str,
    hidden: int,
    heads: int,
    kv: int,
    dim: int,
    *,
    has_bias: bool = False,
    has_norms: bool = False,
    is_gated: bool = False,
) -> Tensors:
    """Return the attention of a layer."""
    q, kv = heads * dim, kv * dim
    found = matrices(
        f"{prefix}self_attn.",
        q_proj=(q * (2 if is_gated else 1), hidden),
        k_proj=(kv, hidden),
        v_proj=(kv, hidden),
        o_proj=(hidden, q),
    )
    if has_bias:
        sizes = {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
        found |= bf16(f"{prefix}self_attn.", sizes)
    if has_norms:
        found |= matrices(f"{prefix}self_attn.", q_norm=(dim,), k_norm=(dim,))
    return found


def mlp(prefix: str, hidden: int, inner: int) -> Tensors:
    """Return a SwiGLU."""
    return matrices(
        prefix,
        gate_proj=(inner, hidden),
        up_proj=(inner, hidden),
        down_proj=(hidden, inner),
    )


def mixture(
    prefix: str, hidden: int, experts: int, inner: int, *, shared: int = 0, is_fused: bool = False
) -> Tensors:
    """Return experts, each by itself or all in two tensors, with or without a shared one."""
    found = matrices(f"{prefix}mlp.", gate=(experts, hidden))
    if is_fused:
        together = {
            "experts.gate_up_proj": (experts, 2 * inner, hidden),
            "experts.down_proj": (experts, hidden, inner),
        }
        found |= bf16(f"{prefix}mlp.", together)
    else:
        for expert in range(experts):
            found |= mlp(f"{prefix}mlp.experts.{expert}.", hidden, inner)
    if shared:
        found |= mlp(f"{prefix}mlp.shared_expert.", hidden, shared)
        found |= matrices(f"{prefix}mlp.", shared_expert_gate=(1, hidden))
    return found


def delta_net(prefix: str, hidden: int, values: int, *, is_grouped: bool = False) -> Tensors:
    """Return a Gated DeltaNet of 16 key heads and *values* value heads of 128 elements."""
    keys, all_values = 16 * 128, values * 128
    conv = 2 * keys + all_values
    projections = (
        {"in_proj_qkvz": (conv + all_values, hidden), "in_proj_ba": (2 * values, hidden)}
        if is_grouped
        else {
            "in_proj_qkv": (conv, hidden),
            "in_proj_z": (all_values, hidden),
            "in_proj_b": (values, hidden),
            "in_proj_a": (values, hidden),
        }
    )
    prefix += "linear_attn."
    return {
        **matrices(
            prefix, **projections, conv1d=(conv, 1, 4), norm=(128,), out_proj=(hidden, all_values)
        ),
        f"{prefix}dt_bias": ("BF16", (values,)),
        f"{prefix}A_log": ("F32", (values,)),
    }


def drafts(hidden: int, layer: Tensors) -> Tensors:
    """Return the layer that drafts tokens, and what is around it."""
    names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    around = matrices("mtp.", fc=(hidden, 2 * hidden), **dict.fromkeys(names, (hidden,)))
    return around | layer


def eyes(hidden: int) -> Tensors:
    """Return the vision tower, with one of its blocks."""
    sizes = {
        "attn.qkv": (3456, 1152),
        "attn.proj": (1152, 1152),
        "mlp.linear_fc1": (4304, 1152),
        "mlp.linear_fc2": (1152, 4304),
        "norm1": (1152,),
        "norm2": (1152,),
    }
    block = {f"{name}.weight": shape for name, shape in sizes.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in sizes.items()}
    around = {
        "patch_embed.proj.weight": (1152, 3, 2, 16, 16),
        "patch_embed.proj.bias": (1152,),
        "pos_embed.weight": (2304, 1152),
        "merger.norm.weight": (1152,),
        "merger.norm.bias": (1152,),
        "merger.linear_fc1.weight": (4608, 4608),
        "merger.linear_fc1.bias": (4608,),
        "merger.linear_fc2.weight": (hidden, 4608),
        "merger.linear_fc2.bias": (hidden,),
    }
    return bf16("model.visual.blocks.0.", block) | bf16("model.visual.", around)


# -- tensors of GGUF files --


def stored(prefix: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Tensors:
    """Return the weights *shapes* of a layer, or of the whole, as GGUF names them."""
    return {f"{prefix}{name}.weight": of for name, of in shapes.items()}


def gguf_ends(vocab: int, hidden: int, embedding: str, head: str | None) -> Tensors:
    """Return what is before and behind the layers; without a *head* it is tied."""
    found = {"token_embd": (embedding, (vocab, hidden)), "output_norm": ("F32", (hidden,))}
    return stored("", found | ({"output": (head, (vocab, hidden))} if head else {}))


def gguf_attention(
    prefix: str,
    hidden: int,
    heads: int,
    kv: int,
    dim: int,
    *,
    kinds: tuple[str, str],
    has_bias: bool = False,
    has_norms: bool = False,
    is_gated: bool = False,
) -> Tensors:
    """Return the attention of a layer, of the first kind, its values of the second."""
    kind, values = kinds
    q, kv = heads * dim, kv * dim
    found = stored(
        prefix,
        {
            "attn_norm": ("F32", (hidden,)),
            "attn_q": (kind, (q * (2 if is_gated else 1), hidden)),
            "attn_k": (kind, (kv, hidden)),
            "attn_v": (values, (kv, hidden)),
            "attn_output": (kind, (hidden, q)),
        },
    )
    if has_bias:
        found |= {
            f"{prefix}attn_{name}.bias": ("F32", (size,))
            for name, size in (("q", q), ("k", kv), ("v", kv))
        }
    if has_norms:
        found |= stored(prefix, {f"attn_{name}_norm": ("F32", (dim,)) for name in "qk"})
    return found


def gguf_mlp(
    prefix: str, hidden: int, inner: int, kinds: tuple[str, str], tail: str = ""
) -> Tensors:
    """Return a SwiGLU, the way down of the second kind; its names end in *tail*."""
    kind, down = kinds
    return stored(
        prefix,
        {
            f"ffn_gate{tail}": (kind, (inner, hidden)),
            f"ffn_up{tail}": (kind, (inner, hidden)),
            f"ffn_down{tail}": (down, (hidden, inner)),
        },
    )


def gguf_mixture(
    prefix: str,
    hidden: int,
    experts: int,
    inner: int,
    *,
    kinds: tuple[str, str],
    shared: int = 0,
    is_fused: bool = False,
) -> Tensors:
    """Return the experts of a layer, of the first kind, their way down of the second."""
    kind, down = kinds
    up = (
        {"ffn_gate_up_exps": (kind, (experts, 2 * inner, hidden))}
        if is_fused
        else dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (kind, (experts, inner, hidden)))
    )
    found = {
        "ffn_gate_inp": ("F32", (experts, hidden)),
        **up,
        "ffn_down_exps": (down, (experts, hidden, inner)),
    }
    if shared:
        found["ffn_gate_inp_shexp"] = ("F32", (hidden,))
        return stored(prefix, found) | gguf_mlp(prefix, hidden, shared, kinds, "_shexp")
    return stored(prefix, found)


def gguf_delta_net(
    prefix: str, hidden: int, values: int, kind: str, *, projections: str = "qwen35"
) -> Tensors:
    """Return a Gated DeltaNet, with the *projections* of an architecture, or older ``ssm_in``."""
    keys, all_values = 16 * 128, values * 128
    conv = 2 * keys + all_values
    apart = {"attn_qkv": (kind, (conv, hidden)), "attn_gate": (kind, (all_values, hidden))}
    inputs = {
        "qwen35": {
            **apart,
            "ssm_alpha": ("F32", (values, hidden)),
            "ssm_beta": ("F32", (values, hidden)),
        },
        "qwen3next": {**apart, "ssm_ba": (kind, (2 * values, hidden))},
        "ssm_in": {
            "ssm_in": (kind, (conv + all_values, hidden)),
            "ssm_ba": (kind, (2 * values, hidden)),
        },
    }[projections]
    return {
        **stored(
            prefix,
            {
                "attn_norm": ("F32", (hidden,)),
                **inputs,
                "ssm_conv1d": ("F32", (conv, 4)),
                "ssm_norm": ("F32", (128,)),
                "ssm_out": (kind, (hidden, all_values)),
            },
        ),
        f"{prefix}ssm_a": ("F32", (values,)),
        f"{prefix}ssm_dt.bias": ("F32", (values,)),
    }
