"""Checkpoint tensors into modules, streamed.

The model is built empty; each of its matrices then names the tensors it is stacked from, and their
bytes are read from the file straight into the place they stay. Reading beats mapping here: the
file may be replaced or go away while the model serves, a damaged one is an error and not a SIGBUS,
and every page is in memory before the first request. Every tensor of the file must be used and
every matrix filled, so a checkpoint of another shape cannot load by accident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cortex.models.batch import KVCache
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError, naming
from cortex.models.checkpoints.names import is_derived, parameter_name
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.kernels import cpu
from cortex.models.layers import RMSNorm
from cortex.models.quantization import DENSE, DENSE_NAMES, Matrix, Part, row_bytes
from cortex.models.registry import ARCHITECTURES, Architecture

CHUNK_BYTES = 1 << 23  # how often progress is told and a cancelled load can stop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[int, int], None]


@dataclass
class LoadedModel:
    """A model on its device, and what the engine must know to feed it."""

    module: nn.Module  # module(batch: Batch) -> logits, float32 [R, V]
    device: torch.device
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    vocab_size: int
    max_position_embeddings: int
    weights_bytes: int

    def new_cache(self, blocks: int, block_tokens: int) -> KVCache:
        """Allocate an empty cache of *blocks* blocks of *block_tokens* positions."""
        shape = (blocks, block_tokens, self.num_kv_heads, self.head_dim)

        def layers() -> list[Tensor]:
            return [
                torch.empty(shape, dtype=self.kv_dtype, device=self.device)
                for _ in range(self.num_layers)
            ]

        return KVCache(keys=layers(), values=layers(), block_tokens=block_tokens)


def load_model(
    path: Path, *, device: torch.device, dtype: str, on_progress: Progress
) -> LoadedModel:
    """Load the GGUF file or checkpoint directory *path* onto *device*.

    *dtype* is the width of activations and cache: "auto" is float32 on a CPU and the checkpoint's
    own elsewhere. Quantised weights stay packed whatever it is. *on_progress* gets bytes done and
    in total; what it raises ends the load. Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.check_supported()
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    config = _config(checkpoint, architecture)
    width = activation_dtype(checkpoint, device, dtype)
    if device.type == "cpu":
        cpu.kernels()  # compiled now rather than within the first request
    module = architecture.model(config, width).eval().to(device)
    with naming(path), checkpoint.weights_path.open("rb", buffering=0) as file:
        sources = _sources(checkpoint, is_tied=config.tie_word_embeddings)
        reader = _Reader(file, sum(source.nbytes for source in sources.values()), on_progress)
        _Filler(
            sources,
            reader,
            fused=architecture.fused,
            paired=architecture.gguf_paired if checkpoint.format == "gguf" else (),
            head_dim=config.head_dim,
            width=width,
        ).fill(module, device)
    return LoadedModel(
        module=module,
        device=device,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_dtype=width,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        weights_bytes=resident_bytes(module),
    )


def activation_dtype(checkpoint: Checkpoint, device: torch.device, dtype: str) -> torch.dtype:
    """Return the width of activations that *dtype* means here; raises ValueError."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    totals = Counter[str]()
    for tensor in checkpoint.tensors.values():
        totals[tensor.type] += tensor.nbytes
    return DENSE.get(max(totals, key=totals.__getitem__), torch.bfloat16)


def resident_bytes(module: nn.Module) -> int:
    """Memory that the weights of *module* take, each shared one counted once."""
    matrices = sum(child.bytes for child in module.modules() if isinstance(child, Matrix))
    return matrices + sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def _config(checkpoint: Checkpoint, architecture: Architecture) -> Any:
    try:
        config = architecture.config(checkpoint.config)
    except (ValueError, TypeError) as exc:
        raise CheckpointError(f"{checkpoint.path}: {exc}") from exc
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path}: claims {config.num_hidden_layers} layers, "
            f"but has only {len(checkpoint.tensors)} tensors"
        )
    return config


def _sources(checkpoint: Checkpoint, *, is_tied: bool) -> dict[str, TensorInfo]:
    """Return the tensors to load, under our names."""
    found = {
        parameter_name(name, checkpoint.format): tensor
        for name, tensor in checkpoint.tensors.items()
        if not is_derived(name)
    }
    if is_tied:
        found.pop("lm_head.weight", None)  # a copy that the configuration says to ignore
    return found


class _Reader:
    """Reads tensors of one file into memory and tells how far it is."""

    def __init__(self, file: FileIO, total: int, on_progress: Progress) -> None:
        self.file = file
        self.total = total
        self.done = 0
        self.on_progress = on_progress

    def read(self, tensor: TensorInfo, into: Tensor) -> None:
        """Fill *into*, contiguous bytes on the CPU, with the tensor as stored."""
        view = into.numpy().data.cast("B")
        self.file.seek(tensor.offset)
        while view:
            count = self.file.readinto(view[:CHUNK_BYTES])
            if not count:
                raise CheckpointError(f"the file ended within tensor {tensor.name!r}")
            view = view[count:]
            self.done += count
            self.on_progress(self.done, self.total)


class _Filler:
    """Fills the matrices and norms of a model from the tensors they are stacked from."""

    def __init__(
        self,
        sources: dict[str, TensorInfo],
        reader: _Reader,
        *,
        fused: Mapping[str, tuple[str, ...]],
        paired: tuple[str, ...],
        head_dim: int,
        width: torch.dtype,
    ) -> None:
        self.sources = sources
        self.reader = reader
        self.fused = fused
        self.paired = paired
        self.head_dim = head_dim
        self.width = width

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Fill all of *module* and see that nothing of the file is left over."""
        for name, child in module.named_modules():
            if isinstance(child, Matrix):
                child.fill([part.to(device) for part in self._parts(name, child)])
            elif isinstance(child, RMSNorm):
                child.weight = self._vector(f"{name}.weight", child.weight.shape).to(device)
        if self.sources:
            raise CheckpointError(
                f"has tensors that this architecture has no place for: {_some(self.sources)}"
            )

    def _parts(self, name: str, matrix: Matrix) -> Iterator[Part]:
        """Read the tensors of one matrix, neighbours of the same type into one part."""
        tensors = list(self._tensors(name))
        if any(len(t.shape) != 2 or t.shape[1] != matrix.columns for _, t in tensors) or (
            sum(tensor.shape[0] for _, tensor in tensors) != matrix.rows
        ):
            raise CheckpointError(
                f"{name} is {matrix.rows} x {matrix.columns} by the configuration, but made of "
                + ", ".join(f"{tensor.name} {tensor.shape}" for _, tensor in tensors)
            )
        for kind, group in groupby(tensors, key=lambda source: source[1].type):
            data = self._stacked(kind, list(group), matrix.columns)
            yield self._in_width(Part(kind, data))

    def _tensors(self, name: str) -> Iterator[tuple[str, TensorInfo]]:
        """Take the sources of ``layers.0.mlp.gate_up_proj.weight``, with their short names."""
        prefix, _, short = name.removesuffix(".weight").rpartition(".")
        for source in self.fused.get(short, (short,)):
            yield source, self._take(f"{prefix}.{source}.weight".lstrip("."))

    def _take(self, name: str) -> TensorInfo:
        if name not in self.sources:
            raise CheckpointError(f"tensor {name!r} is missing")
        return self.sources.pop(name)

    def _stacked(self, kind: str, tensors: list[tuple[str, TensorInfo]], columns: int) -> Tensor:
        rows = sum(tensor.shape[0] for _, tensor in tensors)
        data = torch.empty(rows, row_bytes(kind, columns), dtype=torch.uint8)
        start = 0
        for short, tensor in tensors:
            place = data[start : start + tensor.shape[0]]
            self.reader.read(tensor, place)
            if short in self.paired:
                place.copy_(_halves_from_pairs(place, self.head_dim))
            start += tensor.shape[0]
        return data

    def _in_width(self, part: Part) -> Part:
        """Bring dense weights to 16-bit activations' type; in float32 they stay as stored."""
        if part.kind not in DENSE or self.width == torch.float32:
            return part
        weights = part.data.view(DENSE[part.kind]).to(self.width)
        return Part(DENSE_NAMES[self.width], weights.view(torch.uint8))

    def _vector(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self._take(name)
        if tensor.shape != tuple(shape) or tensor.type not in DENSE:
            raise CheckpointError(
                f"tensor {tensor.name!r} is {tensor.type} {tensor.shape}, "
                f"not floats of shape {tuple(shape)}"
            )
        data = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self.reader.read(tensor, data)
        return data.view(DENSE[tensor.type]).float()


def _halves_from_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads * D, ...] from rotary pairs to rotary halves (see ``models.rope``)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.size(1))  # [heads, D / 2, 2, bytes]
    return pairs.transpose(1, 2).flatten(0, 2)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
