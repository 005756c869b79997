"""A checkpoint into a model on its device.

The model is built empty. ``sources`` finds the tensors that its parameters are made of, ``filler``
makes their places and says what belongs there, ``tensor_reader`` reads it. Every parameter must be
filled and every tensor used, so a checkpoint of another shape cannot load by accident.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.errors import CheckpointError, naming
from cortex.models.checkpoints.inner_blocks import inner_block
from cortex.models.checkpoints.quantized import is_fp8
from cortex.models.checkpoints.sizes import context_tokens
from cortex.models.checkpoints.tensors import QUANTS
from cortex.models.execution import DEFAULT, Execution
from cortex.models.filler import Filler, Form, Kept
from cortex.models.kernels import cpu, cuda, cuda_attention
from cortex.models.layers import Decoder
from cortex.models.linear import Projection
from cortex.models.loaded_model import LoadedModel, resident_bytes
from cortex.models.mixture import Experts
from cortex.models.packed_cache import Damaged, PackedCache, key_of
from cortex.models.parallel import ALONE, Group
from cortex.models.quantization import DENSE, Matrix
from cortex.models.registry import ARCHITECTURES, Architecture
from cortex.models.sources import Sources
from cortex.models.staging import Piece, lane_for, stream_of
from cortex.models.tensor_reader import Files, Progress, read_pieces

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MAX_READERS = 8

log = logging.getLogger(__name__)


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: str,
    on_progress: Progress,
    execution: Execution = DEFAULT,
    quant: str | None = None,
    group: Group = ALONE,
    cache_directory: Path | None = None,
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

    Where *quant* is one of ``QUANTS``, the matrices of a dense checkpoint are quantised on the way
    (but for heads tied to the embedding), and what came of it is kept in *cache_directory*, from
    where the next load reads it. Of a *group* the rank reads its own bytes only.

    *on_progress* gets the bytes of weights, as they stay in memory, that are there and in total;
    what it raises ends the load. Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.check_supported()
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    config = _config(checkpoint, architecture)
    quantised = _quantised_type(checkpoint, quant)
    group = replace(group, block=inner_block(checkpoint, quant))
    kernels = cpu.kernels() if device.type == "cpu" else None  # compiled now, not with a request
    is_tiled = kernels is not None and dtype in {"auto", "float16"}
    width = torch.float32 if is_tiled else activation_dtype(checkpoint, device, dtype)
    module = _module(checkpoint, architecture, config, width, group).to(device)
    form = Form(
        width,
        config.head_dim,
        device,
        kernels.tile_into if kernels and is_tiled else None,
        quantised,
    )
    loading = _Loading(checkpoint, architecture, config, form, module, on_progress)
    with naming(path):
        if form.quant and cache_directory:
            loading.with_cache(_cache(checkpoint, cache_directory, form.quant, module, group))
        else:
            loading.from_checkpoint()
    if device.type == "cuda":
        _prepare(module, config, width, group, execution)
    return LoadedModel(
        module=module,
        device=device,
        dtype=width,
        caches=module.caches,
        kv_dtype=torch.float16 if is_tiled and dtype == "float16" else width,
        vocab_size=config.vocab_size,
        max_position_embeddings=context_tokens(checkpoint.config),
        weights_bytes=resident_bytes(module),
        execution=execution,
    )


def _module(
    checkpoint: Checkpoint,
    architecture: Architecture,
    config: Any,
    width: torch.dtype,
    group: Group,
) -> Decoder:
    """Build the model without its weights."""
    try:
        return architecture.model(config, width, group).eval()
    except ValueError as exc:
        raise CheckpointError(f"{checkpoint.path}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _Loading:
    """One load: from where the weights of *module* come."""

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any
    form: Form
    module: Decoder
    on_progress: Progress

    def from_checkpoint(self, kept: Kept = Kept()) -> None:  # noqa: B008 - frozen
        """Fill the module, with what is *kept* of it from there."""
        sources = Sources(
            self.checkpoint,
            fused=self.architecture.fused,
            paired=self.architecture.gguf_paired,
            is_tied=self.config.tie_word_embeddings,
        )
        pieces = Filler(sources, self.form, kept).fill(self.module)
        _read(pieces, self.form.device, self.on_progress)

    def with_cache(self, cache: PackedCache) -> None:
        """Take what was quantised before from *cache*, or quantise and leave it there."""
        if found := cache.find():
            try:
                return self.from_checkpoint(Kept(found=found))
            except Damaged as exc:
                log.warning("quantised weights are made anew: %s", exc)
                cache.discard()
        new = cache.new_file()
        with ExitStack() as abandoning:
            if new:
                abandoning.callback(new.abandon)
            self.from_checkpoint(Kept(new=new))
            if new and cache.make_room(new.nbytes):
                new.finish()
        return None


def _quantised_type(checkpoint: Checkpoint, quant: str | None) -> str | None:
    """Return the type that *quant* means; raises CheckpointError where it means none here."""
    if quant is None:
        return None
    if quant not in QUANTS:
        raise CheckpointError(
            f"{checkpoint.path}: quant {quant!r} is not one of {', '.join(QUANTS)}"
        )
    if checkpoint.format == "gguf" or is_fp8(checkpoint.config):
        raise CheckpointError(
            f"{checkpoint.path}: quant {quant!r} is for dense safetensors; this is as it is"
        )
    return QUANTS[quant]


def _cache(
    checkpoint: Checkpoint, directory: Path, kind: str, module: Decoder, group: Group
) -> PackedCache:
    cuts = [
        (name, child.stacked, child.cut)
        for name, child in module.named_modules()
        if isinstance(child, Matrix)
    ]
    paths = {tensor.path for tensor in checkpoint.tensors.values()}
    recipe = (kind, group.rank, group.ranks, checkpoint.config, cuts)
    return PackedCache(directory, key_of(paths, recipe))


def _read(pieces: list[Piece], device: torch.device, on_progress: Progress) -> None:
    """Read them by as many threads as there are cores, within reason."""
    on_progress(0, sum(piece.weights_bytes for piece in pieces))
    readers = min(MAX_READERS, max(2, len(os.sched_getaffinity(0))), len(pieces))
    buffered = (piece.nbytes for piece in pieces if piece.land or device.type == "cuda")
    buffer_bytes = max(buffered, default=0)
    lanes = [lane_for(device, buffer_bytes) for _ in range(readers)]
    with closing(Files()) as files:
        read_pieces(pieces, lanes, on_progress, files=files, in_thread=stream_of(device))


def _prepare(
    module: Decoder, config: Any, width: torch.dtype, group: Group, execution: Execution
) -> None:
    """Have the GPU's kernels chosen, compiled and tried before a step is run or measured."""
    for child in module.modules():
        if isinstance(child, (Projection, Experts)):
            child.is_batch_invariant = execution.is_batch_invariant
    heads = (group.count(config.num_attention_heads), module.caches.kv_heads, config.head_dim)
    shape = cuda_attention.Shape(*heads, cuda.BLOCK_TOKENS, width)
    cuda.prepare(shape, execution, has_states=module.caches.state is not None)
    matrices = (child for child in module.modules() if isinstance(child, Projection))
    parts = (part for child in matrices for part in child.weight.parts)
    cuda.prepare_products(parts, width, is_batch_invariant=execution.is_batch_invariant)
    layers = (
        {"gate": child.gate_proj, "up": child.up_proj, "down": child.down_proj}
        for child in module.modules()
        if isinstance(child, Experts)
    )
    cuda.prepare_experts(layers, width, is_batch_invariant=execution.is_batch_invariant)


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


def _config(checkpoint: Checkpoint, architecture: Architecture) -> Any:
    raw = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        config = architecture.config(raw)  # check_supported has seen what is left out
    except (ValueError, TypeError) as exc:
        raise CheckpointError(f"{checkpoint.path}: {exc}") from exc
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path}: claims {config.num_hidden_layers} layers, "
            f"but has only {len(checkpoint.tensors)} tensors"
        )
    return config
