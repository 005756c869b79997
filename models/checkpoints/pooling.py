"""How a checkpoint says that the hidden states of a text become its embedding.

A GGUF file has ``<architecture>.pooling_type``; a directory of the sentence-transformers library
has ``1_Pooling/config.json``. None: nothing is declared, or a way that is not implemented (the
first token, several ways at once, a layer behind the pooling).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cortex.models.checkpoints.files import exists
from cortex.models.checkpoints.json import read_object

Pooling = Literal["last", "mean"]

GGUF_POOLING: dict[int, Pooling] = {1: "mean", 3: "last"}
"""Of llama.cpp's enum llama_pooling_type."""

MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean"}
FLAGS: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}


def pooling_of_gguf(metadata: Mapping[str, Any]) -> Pooling | None:
    """Return what a GGUF file declares."""
    kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    return GGUF_POOLING.get(kind) if type(kind) is int else None


def pooling_of_directory(directory: Path) -> Pooling | None:
    """Return what the modules in *directory* declare; raises CheckpointError."""
    path = directory / "1_Pooling" / "config.json"
    if not exists(path) or exists(directory / "2_Dense"):
        return None
    config = read_object(path)
    mode = config.get("pooling_mode")  # the one word that newer versions of the library write
    if mode is not None:
        return MODES.get(mode) if isinstance(mode, str) else None
    chosen = [
        name for name, value in config.items() if name.startswith("pooling_mode_") and value is True
    ]
    return FLAGS.get(chosen[0]) if len(chosen) == 1 else None
