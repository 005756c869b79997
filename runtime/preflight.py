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

Every one of them is an Unloadable: HTTP 422, with the numbers. ``hub_files.py`` and
``hub_client.py`` list what else can be wrong with a model of a hub, ``sources.py`` the rest.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import ARCHITECTURES, Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.sizes import kv_bytes_per_token
from cortex.models.checkpoints.tensors import LOADABLE
from cortex.runtime import sources
from cortex.runtime.hub_files import quant_not_found, quant_of
from cortex.runtime.sources import AnySource, Source

SMALLEST_CONTEXT_TOKENS = 512
"""A model that cannot hold this much is of no use, so it is not loaded."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SMALLEST_DTYPE_BYTES = 2
"""What ``auto`` is priced at where the device is not known: nothing is refused that might fit."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a load takes of a device: the arithmetic that it is judged by."""

    weights_bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    """What was asked for, else the model's own."""
    smallest_kv_bytes: int
    """Of the smallest cache that does what was asked for."""

    @property
    def least_bytes(self) -> int:
        """With less than this the load is refused."""
        return self.weights_bytes + self.smallest_kv_bytes

    @property
    def context_kv_bytes(self) -> int:
        """Of one full context."""
        return self.context_tokens * self.kv_bytes_per_token


def check_request(request: LoadRequest, roots: Sequence[Path] | None = None) -> AnySource:
    """Return the source of *request*; raise Unloadable for what no download could change."""
    if (request.tensor_parallel or 1) > 1 or len(request.devices or []) > 1:
        raise Unloadable(
            "a model on several devices (tensor parallelism) is not supported by this version",
            kind="tensor_parallel_unsupported",
        )
    source = Source.parse(request.model_id, roots)
    sources.refuse_other_quant(source, request.quant)
    return source


def check(
    path: Path, request: LoadRequest, memory_bytes: int, measured: Footprint | None = None
) -> Checkpoint:
    """Return the opened checkpoint at *path*; raise Unloadable.

    *memory_bytes* is what the device has for models in all, *measured* what an earlier load held.
    """
    checkpoint = opened(path)
    judge(checkpoint, request, memory_bytes, measured)
    return checkpoint


def opened(path: Path) -> Checkpoint:
    """Return the checkpoint at *path*; raise Unloadable where its headers cannot be read."""
    try:
        return Checkpoint.open(path)
    except CheckpointError as exc:
        raise Unloadable(str(exc), kind="corrupt_checkpoint") from exc


def judge(
    checkpoint: Checkpoint,
    request: LoadRequest,
    memory_bytes: int,
    measured: Footprint | None = None,
) -> Needs:
    """Return what the load takes; raise Unloadable where that is more than *memory_bytes*.

    Weights that were *measured* at an earlier load count instead of arithmetic.
    """
    found = needs(checkpoint, request)
    if measured is not None:
        found = dataclasses.replace(found, weights_bytes=measured.weights_bytes)
    _check_memory(found, memory_bytes)
    return found


def needs(
    checkpoint: Checkpoint, request: LoadRequest, auto_bytes: int = SMALLEST_DTYPE_BYTES
) -> Needs:
    """Return what the load takes; raise Unloadable for what would work on no device at all.

    *auto_bytes* is the width of the dtype ``auto``; see ``auto_dtype_bytes``.
    """
    try:
        _check_architecture(checkpoint)
        _check_tensor_types(checkpoint)
        checkpoint.check_supported()
        _check_quant(checkpoint, request.quant)
        _check_context(checkpoint, request)
        return _needs(checkpoint, request, auto_bytes)
    except CheckpointError as exc:
        raise Unloadable(str(exc), kind="corrupt_checkpoint") from exc


def auto_dtype_bytes(checkpoint: Checkpoint, *, is_cpu: bool) -> int:
    """Return the width of activations and cache that ``auto`` means on a device."""
    totals = Counter[str]()
    for tensor in checkpoint.tensors.values():
        totals[tensor.type] += tensor.nbytes
    is_wide = max(totals, key=totals.__getitem__, default=None) == "F32"
    return 4 if is_cpu or is_wide else 2


def judge_size(size_bytes: int, memory_bytes: int) -> None:
    """Raise Unloadable where files that are not here yet are too large, by their size alone."""
    _check_memory(Needs(size_bytes, 0, 0, 0), memory_bytes)


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
    if quant.upper() not in {checkpoint.quant, quant_of(checkpoint.path.name)}:
        raise quant_not_found(checkpoint.path.name, quant, [checkpoint.quant])


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


def _needs(checkpoint: Checkpoint, request: LoadRequest, auto_bytes: int) -> Needs:
    width_bytes = DTYPE_BYTES.get(request.dtype, auto_bytes)
    per_token = kv_bytes_per_token(checkpoint.config, width_bytes)
    longest = _longest_context(checkpoint)
    smallest = request.max_context_tokens or min(longest, SMALLEST_CONTEXT_TOKENS)
    return Needs(
        weights_bytes=checkpoint.weights_bytes,
        kv_bytes_per_token=per_token,
        context_tokens=request.max_context_tokens or longest,
        smallest_kv_bytes=(
            smallest * per_token if request.kv_cache_mb is None else request.kv_cache_mb << 20
        ),
    )


def _check_memory(needs: Needs, memory_bytes: int) -> None:
    if needs.least_bytes > memory_bytes:
        raise Unloadable(
            f"the model needs at least {_mb(needs.least_bytes)} MB "
            f"({_mb(needs.weights_bytes)} MB of weights, {_mb(needs.smallest_kv_bytes)} MB of KV "
            f"cache), the device has {memory_bytes >> 20} MB",
            kind="insufficient_memory",
            weights_bytes=needs.weights_bytes,
            kv_bytes=needs.smallest_kv_bytes,
            memory_bytes=memory_bytes,
        )


def _mb(count: int) -> int:
    """Whole megabytes, rounded up: a refusal must not look as if it fitted."""
    return -(-count >> 20)
