"""What each token id of a checkpoint stands for: its bytes, or that it is no text.

The supervisor reads the same files (``runtime/tokenizer.py``) for more than that. Here only the
vocabulary is needed, and the tokenizer's other tables, most of the file, are not looked at. Reading
takes some 0.1 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_bytes
from cortex.models.checkpoints.token_bytes import token_bytes

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 26
"""Twice the largest tokenizer.json known."""
CONTROL = 3
"""The ``tokenizer.ggml.token_type`` of tokens that are no text."""


class _Added(msgspec.Struct):
    content: str
    id: int = -1
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []


class _TokenizerConfig(msgspec.Struct):
    added_tokens_decoder: dict[int, _Added] = {}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of each token, none for an id without one; ``control_ids`` are those of no text."""

    texts: list[bytes]
    control_ids: frozenset[int]

    @classmethod
    def from_checkpoint(cls, path: Path) -> Vocabulary:
        """Read that of a GGUF file or a directory; raise CheckpointError."""
        return _of_directory(path) if path.is_dir() else _of_gguf(path)


def without_vocabulary() -> Vocabulary:
    """Raise CheckpointError, for a model that came without files."""
    raise CheckpointError("the model has no vocabulary")


def _of_gguf(path: Path) -> Vocabulary:
    metadata = GGUFFile.open(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        raise CheckpointError(f"{path}: it has no vocabulary")
    return Vocabulary(
        [token_bytes(token) for token in tokens],
        frozenset(i for i, kind in enumerate(kinds) if kind == CONTROL),
    )


def _of_directory(path: Path) -> Vocabulary:
    tokenizer = _read(path / "tokenizer.json", _Tokenizer)
    config_path = path / "tokenizer_config.json"
    declared = (
        _read(config_path, _TokenizerConfig).added_tokens_decoder if config_path.exists() else {}
    )
    added = declared | {token.id: token for token in tokenizer.added_tokens}
    ids = {i: text for text, i in tokenizer.model.vocab.items()}
    ids |= {i: token.content for i, token in added.items()}
    texts = [token_bytes(ids.get(i, "")) for i in range(max(ids, default=-1) + 1)]
    return Vocabulary(texts, frozenset(i for i, token in added.items() if token.special))


def _read(path: Path, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(read_bytes(path, MAX_FILE_BYTES), type=shape)
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise CheckpointError(f"{path}: {exc}") from exc
