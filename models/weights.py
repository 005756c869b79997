"""Checkpoint tensors into modules, streamed.

The model is built empty; each of its matrices then names the tensors it is stacked from, and their
bytes are read from their file straight into the place they stay. Reading beats mapping here: a
file may be replaced or go away while the model serves, a damaged one is an error and not a SIGBUS,
and every page is in memory before the first request. Every tensor of the checkpoint must be used
and every matrix filled, so a checkpoint of another shape cannot load by accident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from cortex.models.batch import Batch, KVCache
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError, listed, naming, shown
from cortex.models.checkpoints.files import open_file
from cortex.models.checkpoints.names import is_derived, parameter_name
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.execution import DEFAULT, Execution
from cortex.models.kernels import cpu, cuda, cuda_attention
from cortex.models.kernels.graphs import CudaCapture, DecodeGraphs
from cortex.models.kernels.program import Program
from cortex.models.layers import Decoder, RMSNorm
from cortex.models.linear import Projection
from cortex.models.quantization import DENSE, DENSE_NAMES, Matrix, Part, row_bytes
from cortex.models.registry import ARCHITECTURES, Architecture
from cortex.models.staging import Staging, staging_for

CHUNK_BYTES = 1 << 23  # how often progress is told and a cancelled load can stop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[int, int], None]


@dataclass
class LoadedModel:
    """A model on its device, and what the engine must know to feed it."""

    module: Decoder
    device: torch.device
    dtype: torch.dtype  # of activations
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    vocab_size: int
    max_position_embeddings: int
    weights_bytes: int
    execution: Execution = DEFAULT

    def __post_init__(self) -> None:
        """Tell the products how to multiply; attention finds it in the cache."""
        for child in self.module.modules():
            if isinstance(child, Projection):
                child.is_batch_invariant = self.execution.is_batch_invariant

    def new_cache(self, blocks: int, block_tokens: int) -> KVCache:
        """Allocate an empty cache of *blocks* blocks of *block_tokens* positions.

        On a GPU there is one more, the scratch block.
        """
        if self.device.type == "cpu" and block_tokens == cpu.BLOCK_TOKENS:
            layers = [
                cpu.new_cache_layer(blocks, self.num_kv_heads, self.head_dim, self.kv_dtype)
                for _ in range(self.num_layers)
            ]
            return KVCache([k for k, _ in layers], [v for _, v in layers], block_tokens)
        scratch_block = blocks if self.device.type == "cuda" else None
        blocks += scratch_block is not None
        shape = (blocks, block_tokens, self.num_kv_heads, self.head_dim)
        keys, values = (
            [
                torch.empty(shape, dtype=self.kv_dtype, device=self.device)
                for _ in range(self.num_layers)
            ]
            for _ in range(2)
        )
        return KVCache(keys, values, block_tokens, scratch_block, self.execution)

    def recorded(self, cache: KVCache, max_sequences: int = 16) -> Callable[[Batch], Tensor]:
        """Return what computes a step with *cache* as the module does, only faster.

        On a CPU that is a recording, on a GPU graphs of the decode steps of up to *max_sequences*;
        the logits of both are valid until the next step.
        """
        if self.device.type == "cuda" and self.execution.has_graphs:
            return DecodeGraphs(
                self.module,
                cache,
                CudaCapture(self.device),
                max_sequences=max_sequences,
                context_tokens=self.max_position_embeddings,
            )
        kernels = cpu.kernels() if self.device.type == "cpu" else None
        if kernels is None or self.dtype != torch.float32:
            return self.module
        return Program(self.module, cache, kernels)


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: str,
    on_progress: Progress,
    execution: Execution = DEFAULT,
) -> LoadedModel:
    """Load the GGUF file or checkpoint directory *path* onto *device*.

    *dtype* is the width of activations and cache, "auto" the checkpoint's own. Quantised weights
    stay packed whatever it is. On a CPU with kernels activations are float32, and it says how exact
    the rest is:

        dtype      products with quantised weights          cache
        auto       in 16 bits (quantized_linear.c)          float32
        float16    the same                                 float16, for long contexts
        float32    in float32, a few times slower           float32
        bfloat16   plain torch in that width, far slower    bfloat16

    On a GPU, whose choices are in *execution*, activations and cache have the same width; "auto" is
    that of most of the weights, bfloat16 where they are quantised.

    *on_progress* gets bytes done and in total; what it raises ends the load. Raises
    CheckpointError.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.check_supported()
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    config = _config(checkpoint, architecture)
    kernels = cpu.kernels() if device.type == "cpu" else None  # compiled now, not with a request
    is_tiled = kernels is not None and dtype in {"auto", "float16"}
    width = torch.float32 if is_tiled else activation_dtype(checkpoint, device, dtype)
    module = architecture.model(config, width).eval().to(device)
    sources = _sources(checkpoint, is_tied=config.tie_word_embeddings)
    total = sum(source.nbytes for source in sources.values())
    with _Reader(total, on_progress, staging_for(device)) as reader, naming(path):
        _Filler(
            sources,
            reader,
            fused=architecture.fused,
            paired=architecture.gguf_paired if checkpoint.format == "gguf" else (),
            head_dim=config.head_dim,
            width=width,
            tile=kernels.tile if kernels and is_tiled else None,
            device=device,
        ).fill(module)
    if device.type == "cuda":
        _prepare(module, config, width, execution)
    return LoadedModel(
        module=module,
        device=device,
        dtype=width,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_dtype=torch.float16 if is_tiled and dtype == "float16" else width,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        weights_bytes=resident_bytes(module),
        execution=execution,
    )


def _prepare(module: nn.Module, config: Any, width: torch.dtype, execution: Execution) -> None:
    """Have the GPU's kernels chosen, compiled and tried before a step is run or measured."""
    for child in module.modules():
        if isinstance(child, Projection):
            child.is_batch_invariant = execution.is_batch_invariant
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    cuda.prepare(cuda_attention.Shape(*heads, cuda.BLOCK_TOKENS, width), execution)


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
    """Reads tensors into memory, one open file at a time, and tells how far it is."""

    def __init__(self, total: int, on_progress: Progress, staging: Staging | None) -> None:
        self.total = total
        self.done = 0
        self.on_progress = on_progress
        self.staging = staging
        self.path: Path | None = None
        self.file: FileIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.file:
            self.file.close()

    def read(self, tensor: TensorInfo, into: Tensor) -> None:
        """Fill *into*, contiguous bytes, with the tensor as stored; on a GPU they arrive later."""
        pieces: Iterable[memoryview] = (
            self.staging.pieces(into) if self.staging else [into.numpy().data.cast("B")]
        )
        with naming(tensor.path):
            file = self._opened(tensor.path)
            file.seek(tensor.offset)
            for piece in pieces:
                self._fill(piece, file, tensor)

    def _fill(self, view: memoryview, file: FileIO, tensor: TensorInfo) -> None:
        while view:
            count = file.readinto(view[:CHUNK_BYTES])
            if not count:
                raise CheckpointError(f"the file ended within tensor {shown(tensor.name)}")
            view = view[count:]
            self.done += count
            self.on_progress(self.done, self.total)

    def _opened(self, path: Path) -> FileIO:
        if self.file is None or path != self.path:
            if self.file:
                self.file.close()
            self.file = open_file(path)
            self.path = path
        return self.file


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
        tile: Callable[[Part], Part] | None,
        device: torch.device,
    ) -> None:
        self.sources = sources
        self.reader = reader
        self.fused = fused
        self.paired = paired
        self.head_dim = head_dim
        self.width = width
        self.tile = tile
        self.device = device

    def fill(self, module: nn.Module) -> None:
        """Fill all of *module* and see that nothing of the file is left over."""
        for name, child in module.named_modules():
            if isinstance(child, Matrix):
                child.fill([self._tiled(part) for part in self._parts(name, child)])
            elif isinstance(child, RMSNorm):
                child.weight = self._vector(self._take(f"{name}.weight"), child.size)
            elif isinstance(child, Projection) and child.bias is not None:
                child.bias = self._bias(name, child.weight.stacked)
        if self.sources:
            raise CheckpointError(
                f"has tensors that this architecture has no place for: {listed(self.sources)}"
            )

    def _tiled(self, part: Part) -> Part:
        """Return *part* in the order that its products read it."""
        if self.tile is not None and part.kind not in DENSE:
            return self.tile(part)
        return part

    def _parts(self, name: str, matrix: Matrix) -> Iterator[Part]:
        """Read the tensors of one matrix, neighbours of the same type into one part."""
        tensors = list(self._tensors(name.removesuffix(".weight"), "weight"))
        for rows, (_, tensor) in zip(matrix.stacked, tensors, strict=True):
            _check_shape(tensor, (rows, matrix.columns))
        for kind, group in groupby(tensors, key=lambda source: source[1].type):
            data = self._stacked(kind, list(group), matrix.columns)
            yield self._in_width(Part(kind, data))

    def _tensors(self, name: str, kind: str) -> Iterator[tuple[str, TensorInfo]]:
        """Take the sources of ``layers.0.mlp.gate_up_proj``'s *kind*, with their short names."""
        prefix, _, short = name.rpartition(".")
        for source in self.fused.get(short, (short,)):
            yield source, self._take(f"{prefix}.{source}.{kind}".lstrip("."))

    def _take(self, name: str) -> TensorInfo:
        if name not in self.sources:
            raise CheckpointError(f"tensor {name!r} is missing")
        return self.sources.pop(name)

    def _stacked(self, kind: str, tensors: list[tuple[str, TensorInfo]], columns: int) -> Tensor:
        rows = sum(tensor.shape[0] for _, tensor in tensors)
        data = torch.empty(rows, row_bytes(kind, columns), dtype=torch.uint8, device=self.device)
        start = 0
        for short, tensor in tensors:
            place = data[start : start + tensor.shape[0]]
            self.reader.read(tensor, place)
            if short in self.paired:
                _make_halves_of_pairs(place, self.head_dim)
            start += tensor.shape[0]
        return data

    def _in_width(self, part: Part) -> Part:
        """Bring dense weights to 16-bit activations' type; in float32 they stay as stored."""
        if part.kind not in DENSE or self.width == torch.float32:
            return part
        weights = part.data.view(DENSE[part.kind]).to(self.width)
        return Part(DENSE_NAMES[self.width], weights.view(torch.uint8))

    def _bias(self, name: str, stacked: tuple[int, ...]) -> Tensor:
        """Read the bias of one projection, stacked as its rows are."""
        tensors = self._tensors(name, "bias")
        pieces = zip(tensors, stacked, strict=True)
        return torch.cat([self._vector(tensor, size) for (_, tensor), size in pieces])

    def _vector(self, tensor: TensorInfo, size: int) -> Tensor:
        _check_shape(tensor, (size,))
        if tensor.type not in DENSE:
            raise CheckpointError(f"tensor {shown(tensor.name)} is {tensor.type}, not floats")
        data = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self.device)
        self.reader.read(tensor, data)
        return data.view(DENSE[tensor.type]).float()


def _check_shape(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {shown(tensor.name)} is {tensor.shape}, but by the configuration {shape}"
        )


def _make_halves_of_pairs(rows: Tensor, head_dim: int) -> None:
    """Reorder rows [heads * D, bytes] from rotary pairs to rotary halves (see ``models.rope``).

    On a CPU numpy moves them. torch would share that among threads that spin while they wait, and
    beside a busy process a load then took 1.3 s of processor time instead of 0.4.
    """
    if rows.device.type == "cpu":
        stored = rows.numpy()
        pairs = stored.copy().reshape(-1, head_dim // 2, 2, rows.size(1))  # [heads, D / 2, 2, ...]
        stored[:] = pairs.swapaxes(1, 2).reshape(stored.shape)
    else:
        pairs_there = rows.reshape(-1, head_dim // 2, 2, rows.size(1))
        rows.copy_(pairs_there.transpose(1, 2).flatten(0, 2))
