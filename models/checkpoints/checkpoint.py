"""One face for both kinds of checkpoint: a GGUF file, or a directory with safetensors.

Opening reads headers only and needs no torch: the supervisor decides with it what a load costs
and whether it can work at all; ``models.weights`` reads the tensors in the device process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex.models.checkpoints.config import config_of, generation_config_of
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_object
from cortex.models.checkpoints.safetensors import SafetensorsFile
from cortex.models.checkpoints.tensors import LOADABLE, TensorInfo

ARCHITECTURES = ("llama",)
"""The ``model_type`` values that ``models.registry`` has a module for."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint's headers say; names of tensors are those of its file."""

    path: Path
    format: str  # "gguf" or "safetensors"
    weights_path: Path  # the file that holds the tensors
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of the GGUF file or the directory *path*; raises CheckpointError."""
        return _open_directory(path) if path.is_dir() else _open_gguf(path)

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
                    f"{self.path}: tensor {tensor.name!r} is stored as {tensor.type}, which is "
                    f"not supported; supported: {', '.join(LOADABLE)}"
                )


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile.open(path)
    generation = generation_config_of(file.metadata)
    return Checkpoint(path, "gguf", path, config_of(file), generation, file.tensors)


def _open_directory(path: Path) -> Checkpoint:
    weights = path / "model.safetensors"
    if not weights.exists():
        raise CheckpointError(_why_no_weights(path))
    generation = path / "generation_config.json"
    return Checkpoint(
        path,
        "safetensors",
        weights,
        read_object(path / "config.json"),
        read_object(generation) if generation.exists() else {},
        SafetensorsFile.open(weights).tensors,
    )


def _why_no_weights(path: Path) -> str:
    if (path / "model.safetensors.index.json").exists():
        return f"{path}: weights in several safetensors files (an index) are not supported yet"
    if files := sorted(path.glob("*.gguf")):
        return f"{path}: a directory of GGUF files; name one of them, e.g. {files[0].name}"
    return f"{path}: neither model.safetensors nor a GGUF file is there"
