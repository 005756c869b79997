"""Repositories of tiny models, as bytes: headers that are true, weights that are zero. No torch."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tiny_text import TINY_LLAMA, metadata_of, trained, write_gguf

REPO = "acme/tiny"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "vocab_size": 640,
    "rms_norm_eps": 1e-6,
}
INDEX = "model.safetensors.index.json"


def safetensors(tensors: dict[str, list[int]], kind: str = "BF16", padding: int = 0) -> bytes:
    """Return a file with *tensors* by name and shape, and *padding* bytes in its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "padding": "x" * padding}}
    at = 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def described() -> dict[str, bytes]:
    """Return what lies beside the weights."""
    return {
        "README.md": b"# tiny",
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": b'{"eos_token_id": 1}',
        "tokenizer.json": trained("smollm").to_str().encode(),
        "tokenizer_config.json": b"{}",
    }


def dense(**more: bytes) -> dict[str, bytes]:
    """Return a repository with its weights in one file."""
    weights = safetensors({"model.embed_tokens.weight": [640, 16], "model.norm.weight": [16]})
    return {**described(), "model.safetensors": weights, **more}


def sharded(shards: int = 2) -> dict[str, bytes]:
    """Return a repository with its weights in several files."""
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    files = {name: safetensors({f"w{n}": [64, 16]}) for n, name in enumerate(names)}
    return {**described(), INDEX: json.dumps(index).encode(), **files}


def gguf(architecture: str = "llama") -> bytes:
    """Return a GGUF file in F32."""
    metadata = TINY_LLAMA | metadata_of(trained("smollm"), "smollm")
    with tempfile.TemporaryDirectory() as directory:
        return write_gguf(Path(directory) / "tiny.gguf", metadata, architecture).read_bytes()
