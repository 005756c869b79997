"""Whether a load can work at all, from headers and arithmetic: before anything is allocated.

    kind                             what is wrong
    source_unsupported               nothing here knows where the model would come from
    devices_mismatch                 one device is named twice, or not as many as tensor_parallel
    quant_not_found                  the file holds another quantisation than asked for, or dense
                                     weights do not become that one while they are loaded
    corrupt_checkpoint               a file is damaged, or not what it says it is
    architecture_unsupported         no module of ours runs it
    tensor_type_unsupported          no kernel of ours multiplies with it
    ranks_indivisible                so many devices cannot share its heads, inner sizes or blocks
    context_too_long                 more context was asked for than the model has
    insufficient_memory              weights and the smallest useful cache exceed the device

Every one of them is an Unloadable: HTTP 422, with the numbers. ``hub_files.py`` and
``hub_client.py`` list what else can be wrong with a model of a hub, ``sources.py`` with files,
``device_choice.py`` with devices.

Of a model on several devices all bytes are those of its first rank (``sharding.py``): no other
holds more.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cortex.ipc.engine_options import state_slots
from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import ARCHITECTURES, Checkpoint
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.quantized import FP8_TENSOR, is_fp8
from cortex.models.checkpoints.sharding import (
    Indivisible,
    Sharing,
    kv_heads_of_rank,
    weights_of_rank,
)
from cortex.models.checkpoints.sizes import (
    context_tokens,
    kv_bytes_per_token,
    num_key_value_heads,
    state_bytes,
)
from cortex.models.checkpoints.tensors import LOADABLE, QUANTS
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
    """What a load takes of each of its devices: the arithmetic that it is judged by."""

    weights_bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    """What was asked for, else the model's own."""
    smallest_kv_bytes: int
    """Of the smallest cache that does what was asked for, recurrent states included."""
    state_bytes: int = 0
    """Of the recurrent states of one sequence, in a model that has them."""
    ranks: int = 1

    @property
    def least_bytes(self) -> int:
        """With less than this the load is refused."""
        return self.weights_bytes + self.smallest_kv_bytes

    @property
    def context_kv_bytes(self) -> int:
        """Of one full context."""
        states = state_slots(0, None)[1] * self.state_bytes
        return self.context_tokens * self.kv_bytes_per_token + states


def check_request(request: LoadRequest, roots: Sequence[Path] | None = None) -> AnySource:
    """Return the source of *request*; raise Unloadable for what no download could change."""
    _check_devices(request)
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
    except Indivisible as exc:
        raise Unloadable(
            f"{exc}: ask for another tensor_parallel",
            kind="ranks_indivisible",
            size=exc.size,
            ranks=exc.ranks,
        ) from exc


def in_situ(checkpoint: Checkpoint, quant: str | None) -> str | None:
    """Return what dense weights are to become while they are loaded, None: what they are.

    Raise Unloadable for a *quant* that they cannot become.
    """
    if quant is None or checkpoint.format == "gguf":
        return None
    if is_fp8(checkpoint.config):
        if quant.lower() != "fp8":
            raise quant_not_found(checkpoint.path.name, quant, ["fp8"])
        return None
    if quant.lower() not in QUANTS:
        raise quant_not_found(checkpoint.path.name, quant, QUANTS)
    return quant.lower()


def auto_dtype_bytes(checkpoint: Checkpoint, *, is_cpu: bool) -> int:
    """Return the width of activations and cache that ``auto`` means on a device."""
    totals = Counter[str]()
    for tensor in checkpoint.tensors.values():
        totals[tensor.type] += tensor.nbytes
    is_wide = max(totals, key=totals.__getitem__, default=None) == "F32"
    return 4 if is_cpu or is_wide else 2


def judge_size(size_bytes: int, memory_bytes: int, ranks: int = 1) -> None:
    """Raise Unloadable where files that are not here yet are too large, by their size alone."""
    _check_memory(Needs(size_bytes // ranks, 0, 0, 0, ranks=ranks), memory_bytes)


def _check_devices(request: LoadRequest) -> None:
    """Refuse a request that cannot say which devices it wants."""
    asked = request.devices
    if asked is None:
        return
    if not asked:
        raise Unloadable("devices is empty: name one, or leave it out", kind="no_such_device")
    if len(set(asked)) < len(asked):
        raise Unloadable(f"devices names one of {asked} twice", kind="devices_mismatch")
    if request.tensor_parallel not in {None, len(asked)}:
        raise Unloadable(
            f"tensor_parallel is {request.tensor_parallel}, but devices names {len(asked)}",
            kind="devices_mismatch",
        )


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
    if is_fp8(checkpoint.config):
        types.discard(FP8_TENSOR)
    if unknown := sorted(types.difference(LOADABLE)):
        raise Unloadable(
            f"weights are stored as {', '.join(unknown)}; supported: {', '.join(LOADABLE)}",
            kind="tensor_type_unsupported",
            requested=unknown,
            available=list(LOADABLE),
        )


def _check_quant(checkpoint: Checkpoint, quant: str | None) -> None:
    """Refuse a *quant* that the weights are not and cannot become; None means: as they are."""
    if quant is None:
        return
    if checkpoint.quant is None:
        in_situ(checkpoint, quant)
    elif quant.upper() not in {checkpoint.quant, quant_of(checkpoint.path.name)}:
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
    return context_tokens(checkpoint.config)


def _needs(checkpoint: Checkpoint, request: LoadRequest, auto_bytes: int) -> Needs:
    config, ranks = checkpoint.config, request.ranks
    width_bytes = DTYPE_BYTES.get(request.dtype, auto_bytes)
    of_all_heads = kv_bytes_per_token(config, width_bytes)
    per_token = of_all_heads // num_key_value_heads(config) * kv_heads_of_rank(config, ranks)
    longest, state = _longest_context(checkpoint), state_bytes(config) // ranks
    smallest = request.max_context_tokens or min(longest, SMALLEST_CONTEXT_TOKENS)
    states = state_slots(0, request.max_sequences)[1] * state
    # In "auto" a dense checkpoint keeps its width, on every device.
    is_wide = request.dtype not in {"bfloat16", "float16"}
    sharing = Sharing(ranks, in_situ(checkpoint, request.quant), is_wide)
    return Needs(
        weights_bytes=weights_of_rank(checkpoint, sharing),
        kv_bytes_per_token=per_token,
        context_tokens=request.max_context_tokens or longest,
        smallest_kv_bytes=(
            smallest * per_token + states
            if request.kv_cache_mb is None
            else request.kv_cache_mb << 20
        ),
        state_bytes=state,
        ranks=ranks,
    )


def _check_memory(needs: Needs, memory_bytes: int) -> None:
    if needs.least_bytes <= memory_bytes:
        return
    is_shared = needs.ranks > 1
    each = f" of each of {needs.ranks} devices" if is_shared else ""
    raise Unloadable(
        f"the model needs at least {_mb(needs.least_bytes)} MB{each} "
        f"({_mb(needs.weights_bytes)} MB of weights, {_mb(needs.smallest_kv_bytes)} MB of KV "
        f"cache), {'one of them' if is_shared else 'the device'} has {memory_bytes >> 20} MB",
        kind="insufficient_memory",
        weights_bytes=needs.weights_bytes,
        kv_bytes=needs.smallest_kv_bytes,
        memory_bytes=memory_bytes,
        **({"ranks": needs.ranks} if is_shared else {}),
    )


def _mb(count: int) -> int:
    """Whole megabytes, rounded up: a refusal must not look as if it fitted."""
    return -(-count >> 20)
