"""One face for all kinds of checkpoint: a GGUF file, or a directory with one or more safetensors.

Opening reads headers only and needs no torch: the supervisor decides with it what a load costs
and whether it can work at all; ``models.weights`` reads the tensors in the device process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cortex.models.checkpoints.config import HYBRIDS, config_of, generation_config_of, of_text
from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import exists
from cortex.models.checkpoints.gguf import GGUFFile
from cortex.models.checkpoints.json import read_object
from cortex.models.checkpoints.names import OTHER_TOWERS, is_of_layer_from
from cortex.models.checkpoints.pooling import Pooling, pooling_of_directory, pooling_of_gguf
from cortex.models.checkpoints.quantized import FP8_TENSOR, is_fp8
from cortex.models.checkpoints.safetensors import SafetensorsFile
from cortex.models.checkpoints.shards import INDEX, tensors_by_index
from cortex.models.checkpoints.tensors import LOADABLE, TensorInfo

OF_TEXT = (
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
)
"""Those of which only the text half is loaded: no vision tower, no layers that draft tokens."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *OF_TEXT, *HYBRIDS)
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
        with naming(self.path):
            loadable = (*LOADABLE, *([FP8_TENSOR] if is_fp8(self.config) else []))
        for tensor in self.tensors.values():
            if tensor.type not in loadable:
                raise CheckpointError(
                    f"{self.path}: tensor {shown(tensor.name)} is stored as {tensor.type}, "
                    f"which is not supported; supported: {', '.join(loadable)}"
                )


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile.open(path)
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"{path}: one of {shown(parts)} files of a split GGUF, which is not supported"
        )
    config = config_of(file)
    return Checkpoint(
        path,
        "gguf",
        config,
        generation_config_of(file.metadata),
        {
            name: _as_matrix(tensor)
            for name, tensor in file.tensors.items()
            if not _is_left_out(name, config)
        },
        pooling_of_gguf(file.metadata),
        file,
    )


def _is_left_out(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor belongs to what is not loaded of a model (``OF_TEXT``)."""
    model_type = config.get("model_type")
    if model_type in HYBRIDS:
        return is_of_layer_from(name, config["num_hidden_layers"])
    return model_type in OF_TEXT and name.startswith(OTHER_TOWERS)


def _as_matrix(tensor: TensorInfo) -> TensorInfo:
    """Return *tensor*; the gate of a shared expert, one row, is a vector in GGUF files."""
    if tensor.name.endswith(".ffn_gate_inp_shexp.weight") and len(tensor.shape) == 1:
        return replace(tensor, shape=(1, *tensor.shape))
    return tensor


def _open_directory(path: Path) -> Checkpoint:
    tensors = _tensors(path)
    generation = path / "generation_config.json"
    config = of_text(read_object(path / "config.json"))
    return Checkpoint(
        path,
        "safetensors",
        config,
        read_object(generation) if exists(generation) else {},
        {name: tensor for name, tensor in tensors.items() if not _is_left_out(name, config)},
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
