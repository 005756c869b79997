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
from cortex.models.layers import RMSNorm
from cortex.models.quantization import DENSE_NAMES, Matrix, Part
from cortex.models.registry import ARCHITECTURES
from cortex.models.weights import LoadedModel, resident_bytes

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
"""Those of Qwen3-0.6B, -8B and -32B, by their config.json, and one for a look at the program."""


def random_model(
    shape: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    execution: Execution = DEFAULT,
) -> LoadedModel:
    """Make a model of *shape*; its norms are all ones, its matrices normal around zero."""
    architecture = ARCHITECTURES[shape["model_type"]]
    config = architecture.config(shape)
    module = architecture.model(config, dtype).eval().to(device)
    for child in module.modules():
        if isinstance(child, Matrix):
            weights = torch.empty(child.rows, child.columns, dtype=dtype, device=device)
            weights.normal_(std=child.columns**-0.5)
            child.fill([Part(DENSE_NAMES[dtype], weights.view(torch.uint8))])
        elif isinstance(child, RMSNorm):
            child.weight = torch.ones(child.size, device=device)
    return LoadedModel(
        module=module,
        device=device,
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_dtype=dtype,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        weights_bytes=resident_bytes(module),
        execution=execution,
    )


def read_bytes(model: LoadedModel, shape: Mapping[str, Any]) -> int:
    """Return the bytes of weights that a step reads: all, but for the rows that it looks up."""
    if shape["tie_word_embeddings"]:
        return model.weights_bytes
    embedding = model.module.get_submodule("embed_tokens.weight")
    assert isinstance(embedding, Matrix)
    return model.weights_bytes - embedding.bytes


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
            weights = torch.split(part.data.view(model.dtype), list(child.stacked))
            for source, rows in zip(fused.get(short, (short,)), weights, strict=True):
                inside = "" if source == "lm_head" else "model"
                yield ".".join(filter(None, (inside, prefix, source, "weight"))), rows
