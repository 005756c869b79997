"""Tiny random checkpoints, their reference logits, and a player that feeds ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cortex.models.batch import Batch
from cortex.models.loaded_model import LoadedModel
from cortex.models.parallel import ALONE, Group
from cortex.models.weights import load_model
from random_blocks import random_part

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
GGUF_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
GGUF_ARCHITECTURES = {"qwen3_moe": "qwen3moe"}

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
"""Rows of whole blocks of 256."""

EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
"""What a tiny mixture has beside ``SIZES``."""


def random_model(model_type: str, **overrides: Any) -> Any:
    """Build transformers' model with random weights, wide enough to tell a wrong one."""
    torch.manual_seed(7)
    experts = EXPERTS if "moe" in model_type else {}
    config = AutoConfig.for_model(model_type, **{**SIZES, **experts, **overrides})
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config).eval().float()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.15)
    return model


def saved_model(directory: Path, model_type: str, **overrides: Any) -> Any:
    """Build one and save it as safetensors into *directory*."""
    model = random_model(model_type, **overrides)
    model.save_pretrained(directory)
    return model


def random_llama(**overrides: Any) -> Any:
    """Build a llama."""
    return random_model("llama", **overrides)


def saved_llama(directory: Path, **overrides: Any) -> Any:
    """Build a llama and save it as safetensors into *directory*."""
    return saved_model(directory, "llama", **overrides)


def write_gguf(path: Path, model: Any, kind: str, **extra: Any) -> None:
    """Write transformers' *model* as llama.cpp's converter does, and make it hold what was stored.

    Matrices become *kind*; *model* gets them back dequantised, so that it stays the reference.
    """
    config = model.config
    architecture = GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rotary(writer, config)
    if "moe" in config.model_type:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add(writer, name, weight, kind, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_from_gguf(path: Path) -> Any:
    """Build transformers' float32 model of a llama GGUF file, by the gguf library's reading alone.

    The same as ``from_pretrained(gguf_file=...)``, which needs the accelerate package.
    """
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.eval().float()
    for name, weight in model.state_dict().items():
        if gguf_name(name) in tensors:
            tensor = tensors[gguf_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weight.copy_(torch.from_numpy(_halves(np.array(values), _heads(name, config))))
    return model


def _head_dim(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim)


def _add_rotary(writer: Any, config: Any) -> None:
    """Add the rotary positions as llama.cpp's converter does: Llama 3's as factors of each pair."""
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "attention_factor" in rope:
                writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        case "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
            pairs = torch.arange(0, _head_dim(config), 2).float() / _head_dim(config)
            factors = rope["rope_theta"] ** -pairs / scaled
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        case other:
            assert other == "default"


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a transformers parameter."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{GGUF_LAYER_NAMES['.'.join(middle)]}.{kind}"


def _add(writer: Any, name: str, weight: Tensor, kind: str, config: Any) -> None:
    """Add one tensor, of experts all as one, and give *weight* the values that were stored."""
    if ".experts." in name:
        words = GGUF_EXPERTS[name.rpartition(".")[2]]
        for word, part in zip(words, weight.chunk(len(words), dim=1), strict=True):
            _add_as(writer, f"blk.{name.split('.')[2]}.{word}.weight", part, kind, None)
        return
    kind = "F32" if "ffn_gate_inp" in gguf_name(name) else kind
    _add_as(writer, gguf_name(name), weight, kind, _heads(name, config))


def _add_as(writer: Any, name: str, weight: Tensor, kind: str, heads: int | None) -> None:
    values = _pairs(weight.numpy(), heads)
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    stored_type = gguf.GGMLQuantizationType[kind]
    stored = _stored(values, kind)
    writer.add_tensor(name, stored, raw_dtype=stored_type)
    values = _halves(gguf.quants.dequantize(stored, stored_type), heads)
    weight.copy_(torch.from_numpy(values))


def _stored(values: Any, kind: str) -> Any:
    """Quantise, or take random blocks of such a size where no library quantises to *kind*."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        columns = values.shape[-1]
        blocks = random_part(kind, values.size // columns, columns, float(values.std())).data
        return blocks.view(*values.shape[:-1], -1).numpy()


def _heads(name: str, config: Any) -> int | None:
    """How many heads' rows a GGUF file reorders in this parameter; None for none."""
    if config.model_type != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((count for word, count in heads.items() if word in name), None)


def _pairs(values: Any, heads: int | None) -> Any:
    """Order rows in rotary pairs: what llama.cpp's convert_hf_to_gguf.py calls permute."""
    if heads is None:
        return values
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _halves(values: Any, heads: int | None) -> Any:
    """Order rows in rotary halves, the inverse."""
    if heads is not None:
        values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def loaded(path: Path, *, dtype: str = "float32", group: Group = ALONE) -> LoadedModel:
    """Load *path* on the CPU; unless told otherwise exactly, to be held to a reference."""
    return load_model(
        path, device=torch.device("cpu"), dtype=dtype, group=group, on_progress=lambda *_: None
    )


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids of a tiny model's vocabulary."""
    return random.Random(seed).choices(range(SIZES["vocab_size"]), k=count)


@torch.no_grad()
def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of transformers' model."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


STATE_SLOTS = 12


class Player:
    """Feeds sequences to a model as the engine does, over deliberately scattered blocks."""

    def __init__(self, model: LoadedModel, blocks: int = 64, block_tokens: int = 16) -> None:
        self.model = model
        self.cache = model.new_cache(blocks, block_tokens, STATE_SLOTS)
        self.compute: Callable[[Batch], Tensor] = model.module
        self.free = list(range(blocks))
        random.Random(1).shuffle(self.free)
        self.free_states = list(range(STATE_SLOTS))
        random.Random(2).shuffle(self.free_states)
        self.states: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, **chunks: Sequence[int]) -> dict[str, Tensor]:
        """Feed each named sequence its next tokens; return logits [its tokens, V] of each."""
        batch = self.batch(chunks)
        logits = self.compute(batch)
        sizes = [len(tokens) for tokens in chunks.values()]
        return dict(zip(chunks, torch.split(logits, sizes), strict=True))

    def batch(self, chunks: dict[str, Sequence[int]]) -> Batch:
        """Build the batch, taking the blocks it needs."""
        positions, slots, starts = list[int](), list[int](), [0]
        for name, tokens in chunks.items():
            begin = self.lengths.get(name, 0)
            self.lengths[name] = begin + len(tokens)
            positions += range(begin, begin + len(tokens))
            slots += [self._slot(name, p) for p in range(begin, begin + len(tokens))]
            starts.append(len(positions))
        width = max(len(self.tables[name]) for name in chunks)
        tables = [self.tables[name] + [0] * (width - len(self.tables[name])) for name in chunks]
        return Batch(
            token_ids=torch.tensor([token for tokens in chunks.values() for token in tokens]),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_tokens=torch.tensor([self.lengths[n] for n in chunks], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            sampled=torch.arange(len(positions)),
            cache=self.cache,
            state_slots=torch.tensor([self._state(name) for name in chunks])
            if self.cache.states
            else None,
        )

    def _state(self, name: str) -> int:
        if name not in self.states:
            self.states[name] = self.free_states.pop()
        return self.states[name]

    def _slot(self, name: str, position: int) -> int:
        size = self.cache.block_tokens
        table = self.tables.setdefault(name, [])
        if position // size == len(table):
            table.append(self.free.pop())
        return table[position // size] * size + position % size
