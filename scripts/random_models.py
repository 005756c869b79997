"""Models of known shapes with random weights, made where they stay; no files.

What a step costs does not depend on the weights, so a benchmark needs none that were trained. The
same bytes serve as transformers' model, so that both fit on a device at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cortex.models.execution import DEFAULT, Execution
from cortex.models.kernels import reference
from cortex.models.kernels.planes import planar
from cortex.models.layers import RMSNorm, Vector
from cortex.models.linear import Embedding, Replicated
from cortex.models.loaded_model import LoadedModel, resident_bytes
from cortex.models.quantization import DENSE_NAMES, STORED, ExpertMatrix, Matrix, Part, row_bytes
from cortex.models.registry import ARCHITECTURES

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "32b": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "27b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": False,
    },
    "30b-a3b": {
        **_QWEN3,
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "tiny": {
        **_QWEN3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 512,
    },
}
"""Those of Qwen3-0.6B, -8B and -32B, Qwen3.6-27B and Qwen3-30B-A3B, by their config.json, and one
for a look at the program."""


SCALES: Mapping[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),),
    "Q4_1": ((0, 1.0), (2, -7.5)),
    "Q5_0": ((0, 1.0),),
    "Q5_1": ((0, 1.0), (2, -15.5)),
    "Q8_0": ((0, 1.0),),
    "IQ4_NL": ((0, 1.0),),
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    "IQ4_XS": ((0, 1.0),),
}
"""Where in a block of a type d is, and m as a multiple of it that centres the elements."""

FINITE = 0xBF
"""What of a random byte makes a float of 8 bits that is a number."""


def random_rows(kind: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return uint8 [rows, bytes] of random codes, whose elements have a variance of 1 / columns."""
    size = (rows, row_bytes(kind, columns))
    data = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    blocks = data.view(rows, -1, STORED[kind].block_bytes)
    if kind == "FP8":
        blocks[..., 4:] &= FINITE
    _scale(kind, blocks, 1.0)
    spread = float(reference.dequantize(kind, data[:8]).square().mean().sqrt())
    _scale(kind, blocks, columns**-0.5 / spread)
    return data


def _scale(kind: str, blocks: Tensor, scale: float) -> None:
    if kind == "FP8":
        blocks[..., :4] = torch.tensor([scale]).view(torch.uint8).to(blocks.device)
    for at, times in SCALES.get(kind, ()):
        half = torch.tensor([scale * times], dtype=torch.float16)
        blocks[..., at : at + 2] = half.view(torch.uint8).to(blocks.device)


def random_model(
    shape: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    execution: Execution = DEFAULT,
    stored: str | None = None,
) -> LoadedModel:
    """Make a model of *shape*; its norms are all ones, its matrices normal around zero.

    Where *stored* is a quantised type, what loading would quantise to it is random rows of it.
    """
    architecture = ARCHITECTURES[shape["model_type"]]
    config = architecture.config(shape)
    module = architecture.model(config, dtype).eval().to(device)
    dense = {c.weight for c in module.modules() if isinstance(c, (Embedding, Replicated))}
    for child in module.modules():
        if isinstance(child, Matrix):
            kind = None if child in dense else stored
            child.fill([_random_part(child, kind, dtype, device)])
        elif isinstance(child, RMSNorm):
            child.weight = torch.ones(child.size, device=device)
        elif isinstance(child, Vector):
            value = torch.empty(child.rows.size, *child.rest, device=device)
            child.value = value.uniform_(-1.0, 0.0) if child.is_log else value.normal_(std=0.3)
    return LoadedModel(
        module=module,
        device=device,
        dtype=dtype,
        caches=module.caches,
        kv_dtype=dtype,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        weights_bytes=resident_bytes(module),
        execution=execution,
    )


def _random_part(
    matrix: Matrix, kind: str | None, dtype: torch.dtype, device: torch.device
) -> Part:
    rows, columns = matrix.rows, matrix.columns
    if kind is not None and columns % STORED[kind].block_elements == 0:
        part = Part(kind, random_rows(kind, rows, columns, device))
        return planar(part) if device.type == "cuda" else part
    weights = torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=columns**-0.5)
    return Part(DENSE_NAMES[dtype], weights.view(torch.uint8))


def read_bytes(model: LoadedModel, shape: Mapping[str, Any], tokens: int = 1) -> int:
    """Return the bytes of weights that a step of so many tokens reads.

    All, but for the rows that it looks up, and experts that nobody chooses: each token chooses any
    of them alike.
    """
    unread = 0.0
    if not shape["tie_word_embeddings"]:
        embedding = model.module.get_submodule("embed_tokens.weight")
        assert isinstance(embedding, Matrix)
        unread += embedding.bytes
    for child in model.module.modules():
        if isinstance(child, ExpertMatrix):
            share = shape["num_experts_per_tok"] / child.experts
            unread += child.bytes * (1 - share) ** tokens
    return model.weights_bytes - round(unread)


def state_bytes(model: LoadedModel) -> int:
    """Return what a step reads and writes of one sequence's recurrent state."""
    return 2 * model.caches.state.bytes if model.caches.state else 0


def as_transformers(model: LoadedModel, shape: Mapping[str, Any]) -> Any:
    """Return transformers' model of the same weights, which it shares, but for the norms."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    with torch.device("meta"):
        theirs = make.from_config(AutoConfig.for_model(**shape))
    state = dict(_under_their_names(model, ARCHITECTURES[shape["model_type"]].fused))
    if shape["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(theirs.config).to(
        model.device
    )  # was made without values
    return theirs.eval()


def _under_their_names(
    model: LoadedModel, fused: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, Tensor]]:
    for name, child in model.module.named_modules():
        if isinstance(child, RMSNorm):
            yield f"model.{name}.weight", child.weight.to(model.dtype)
        elif isinstance(child, Matrix):
            (part,) = child.parts
            prefix, _, short = name.removesuffix(".weight").rpartition(".")
            weights = torch.split(
                part.data.view(model.dtype), [rows.size for rows in child.stacked]
            )
            for source, rows in zip(fused.get(short, (short,)), weights, strict=True):
                inside = "" if source == "lm_head" else "model"
                yield ".".join(filter(None, (inside, prefix, source, "weight"))), rows
