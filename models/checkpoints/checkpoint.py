"""One face for all kinds of checkpoint: a GGUF file, or a directory with one or more safetensors.

Opening reads headers only and needs no torch: the supervisor decides with it what a load costs
and whether it can work at all; ``models.weights`` reads the tensors in the device process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex.models.checkpoints.config import config_of, generation_config_of
from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import exists
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_object
from cortex.models.checkpoints.pooling import Pooling, pooling_of_directory, pooling_of_gguf
from cortex.models.checkpoints.safetensors import SafetensorsFile
from cortex.models.checkpoints.shards import INDEX, tensors_by_index
from cortex.models.checkpoints.tensors import LOADABLE, TensorInfo

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""The ``model_type`` values that ``models.registry`` has a module for."""

MAX_MODEL_TYPE_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint's headers say; names of tensors are those of its file."""

    path: Path
    format: str  # "gguf" or "safetensors"
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    pooling: Pooling | None = None  # how embeddings are made, where the checkpoint declares it
    gguf: GGUFFile | None = None  # the header of a GGUF file, with the tokenizer in it

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of the GGUF file or the directory *path*; raises CheckpointError."""
        with naming(path):
            is_directory = path.is_dir()
        checkpoint = _open_directory(path) if is_directory else _open_gguf(path)
        model_type = checkpoint.config.get("model_type")
        if not isinstance(model_type, str) or len(model_type) > MAX_MODEL_TYPE_CHARACTERS:
            raise CheckpointError(f"{path}: the model_type {shown(model_type)} is no name")
        return checkpoint

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors as stored, which is what they take in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def quant(self) -> str | None:
        """The GGUF type that holds most elements' bytes; None for safetensors."""
        if self.format != "gguf":
            return None
        totals = Counter[str]()
        for tensor in self.tensors.values():
            totals[tensor.type] += tensor.nbytes
        return max(totals, key=lambda name: (totals[name], name), default=None)

    def check_supported(self) -> None:
        """Raise CheckpointError if no architecture or kernel of ours can run this checkpoint."""
        model_type = self.config.get("model_type")
        if model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path}: the architecture {model_type!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        for tensor in self.tensors.values():
            if tensor.type not in LOADABLE:
                raise CheckpointError(
                    f"{self.path}: tensor {shown(tensor.name)} is stored as {tensor.type}, "
                    f"which is not supported; supported: {', '.join(LOADABLE)}"
                )


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile.open(path)
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"{path}: one of {shown(parts)} files of a split GGUF, which is not supported"
        )
    return Checkpoint(
        path,
        "gguf",
        config_of(file),
        generation_config_of(file.metadata),
        file.tensors,
        pooling_of_gguf(file.metadata),
        file,
    )


def _open_directory(path: Path) -> Checkpoint:
    tensors = _tensors(path)
    generation = path / "generation_config.json"
    return Checkpoint(
        path,
        "safetensors",
        read_object(path / "config.json"),
        read_object(generation) if exists(generation) else {},
        tensors,
        pooling_of_directory(path),
    )


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a directory; like transformers, prefer the single file."""
    if exists(path / "model.safetensors"):
        return SafetensorsFile.open(path / "model.safetensors").tensors
    if exists(path / INDEX):
        return tensors_by_index(path)
    if files := sorted(path.glob("*.gguf")):
        raise CheckpointError(
            f"{path}: a directory of GGUF files; name one of them, e.g. {files[0].name}"
        )
    raise CheckpointError(
        f"{path}: neither model.safetensors, nor {INDEX}, nor a GGUF file is there"
    )
