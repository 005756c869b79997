"""Whether a load can work at all, from headers and arithmetic: before anything is allocated.

    kind                             what is wrong
    source_unsupported               nothing here knows where the model would come from
    quant_not_found                  the file holds another quantisation than asked for
    quant_unsupported                a dense checkpoint, and quantising while loading comes later
    tensor_parallel_unsupported      more than one device for one model comes later
    corrupt_checkpoint               a file is damaged, or not what it says it is
    architecture_unsupported         no module of ours runs it
    tensor_type_unsupported          no kernel of ours multiplies with it
    context_too_long                 more context was asked for than the model has
    insufficient_memory              weights and the smallest useful cache exceed the device

Every one of them is an Unloadable: HTTP 422, with the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import ARCHITECTURES, Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.sizes import kv_bytes_per_token
from cortex.models.checkpoints.tensors import LOADABLE
from cortex.runtime import sources
from cortex.runtime.sources import FileSource, PypiSource, Source

SMALLEST_CONTEXT_TOKENS = 512
"""A model that cannot hold this much is of no use, so it is not loaded."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""``auto`` is priced at the smallest, so that nothing is refused that might fit."""


def check_request(
    request: LoadRequest, roots: Sequence[Path] | None = None
) -> PypiSource | FileSource:
    """Return the source of *request*; raise Unloadable for what no download could change."""
    if (request.tensor_parallel or 1) > 1 or len(request.devices or []) > 1:
        raise Unloadable(
            "a model on several devices (tensor parallelism) is not supported by this version",
            kind="tensor_parallel_unsupported",
        )
    source = Source.parse(request.model_id, roots)
    sources.refuse_other_quant(source, request.quant)
    return source


def check(path: Path, request: LoadRequest, memory_bytes: int) -> Checkpoint:
    """Return the opened checkpoint at *path*; raise Unloadable.

    *memory_bytes* is what the device has for models in all.
    """
    try:
        checkpoint = Checkpoint.open(path)
        _check_architecture(checkpoint)
        _check_tensor_types(checkpoint)
        checkpoint.check_supported()
        _check_quant(checkpoint, request.quant)
        _check_context(checkpoint, request)
        _check_memory(checkpoint, request, memory_bytes)
    except CheckpointError as exc:
        raise Unloadable(str(exc), kind="corrupt_checkpoint") from exc
    return checkpoint


def _check_architecture(checkpoint: Checkpoint) -> None:
    name = checkpoint.config.get("model_type")
    if name not in ARCHITECTURES:
        raise Unloadable(
            f"the architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}",
            kind="architecture_unsupported",
            requested=name,
            available=list(ARCHITECTURES),
        )


def _check_tensor_types(checkpoint: Checkpoint) -> None:
    types = {tensor.type for tensor in checkpoint.tensors.values()}
    if unknown := sorted(types.difference(LOADABLE)):
        raise Unloadable(
            f"weights are stored as {', '.join(unknown)}; supported: {', '.join(LOADABLE)}",
            kind="tensor_type_unsupported",
            requested=unknown,
            available=list(LOADABLE),
        )


def _check_quant(checkpoint: Checkpoint, quant: str | None) -> None:
    """Refuse a *quant* that is not the file's; None means: as the file is."""
    if quant is None:
        return
    if checkpoint.quant is None:
        raise Unloadable(
            "this checkpoint is dense, and quantising while loading is not supported by this "
            "version: leave quant out",
            kind="quant_unsupported",
        )
    if quant.lower() != checkpoint.quant.lower():
        available = [checkpoint.quant]
        nearest = get_close_matches(quant.upper(), available, n=1, cutoff=0.0)
        raise Unloadable(
            f"{checkpoint.path.name} holds {checkpoint.quant}, not {quant}",
            kind="quant_not_found",
            requested=quant,
            available=available,
            nearest=nearest[0],
        )


def _check_context(checkpoint: Checkpoint, request: LoadRequest) -> None:
    longest = _longest_context(checkpoint)
    wanted = request.max_context_tokens
    if wanted is not None and wanted > longest:
        raise Unloadable(
            f"max_context_tokens is {wanted}, but the model was made for {longest}",
            kind="context_too_long",
            requested_tokens=wanted,
            maximum_tokens=longest,
        )


def _longest_context(checkpoint: Checkpoint) -> int:
    tokens = checkpoint.config.get("max_position_embeddings")
    if type(tokens) is not int or tokens < 1:
        raise CheckpointError(f"{checkpoint.path}: max_position_embeddings is {tokens!r}")
    return tokens


def _check_memory(checkpoint: Checkpoint, request: LoadRequest, memory_bytes: int) -> None:
    weights_bytes = checkpoint.weights_bytes
    kv_bytes = _smallest_kv_bytes(checkpoint, request)
    if weights_bytes + kv_bytes > memory_bytes:
        raise Unloadable(
            f"the model needs at least {_mb(weights_bytes + kv_bytes)} MB "
            f"({_mb(weights_bytes)} MB of weights, {_mb(kv_bytes)} MB of KV cache), "
            f"the device has {memory_bytes >> 20} MB",
            kind="insufficient_memory",
            weights_bytes=weights_bytes,
            kv_bytes=kv_bytes,
            memory_bytes=memory_bytes,
        )


def _smallest_kv_bytes(checkpoint: Checkpoint, request: LoadRequest) -> int:
    """Bytes of the smallest cache that does what was asked for."""
    if request.kv_cache_mb is not None:
        return request.kv_cache_mb << 20
    tokens = request.max_context_tokens
    if tokens is None:
        tokens = min(_longest_context(checkpoint), SMALLEST_CONTEXT_TOKENS)
    return tokens * kv_bytes_per_token(checkpoint.config, DTYPE_BYTES.get(request.dtype, 2))


def _mb(count: int) -> int:
    """Whole megabytes, rounded up: a refusal must not look as if it fitted."""
    return -(-count >> 20)
