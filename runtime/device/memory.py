"""Who holds how much of a device's memory, and how much a new model may take. No torch.

The KV cache of a model gets, in this order:

    kv_cache_bytes                       exactly that
    max_context_tokens, max_sequences    that many full contexts
    else                                 one full context and 512 tokens for each further seat
                                         (32 seats unless max_sequences says otherwise)

The second and third are capped by what is free. A context that nobody asked for is shortened to
what fits, down to 256 tokens; one that was asked for fits or the load is refused, with the numbers.

A model with recurrent states has a slot of them for each seat and for 2 to 16 snapshots. They are
part of the cache, also of one of exactly so many bytes. Where nobody asked for seats there are as
many, up to 32, as a quarter of the memory has slots for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cortex.ipc.engine_options import (
    DEFAULT_SEQUENCES,
    STATES_SHARE,
    cache_tokens,
    state_slots,
)
from cortex.ipc.messages import Footprint, LoadModel
from cortex.runtime.device.refusal import Refused

MINIMUM_CONTEXT_TOKENS = 256
DTYPES = "auto", "float32", "bfloat16", "float16"
_MIB = 2**20


class StepMemory(Protocol):
    """``workspace.Workspace``, which this file must not import: it brings torch."""

    @property
    def fixed_bytes(self) -> int:
        """The part that does not depend on the context."""

    @property
    def bytes_per_context_token(self) -> int:
        """The part that does."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a loaded model asks of the memory that is left beside its weights."""

    max_position_embeddings: int
    kv_bytes_per_token: int
    block_tokens: int
    workspace: StepMemory
    weights_bytes: int = 0
    state_bytes: int = 0
    """Of the recurrent states of one sequence, in a model that has them."""

    @property
    def block_bytes(self) -> int:
        """Memory of one block in all layers."""
        return self.kv_bytes_per_token * self.block_tokens

    def workspace_bytes(self, context_tokens: int) -> int:
        """Return what a largest step takes with sequences of up to *context_tokens*."""
        return self.workspace.fixed_bytes + (
            self.workspace.bytes_per_context_token * context_tokens
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a load settled on."""

    max_context_tokens: int
    max_sequences: int
    blocks: int
    workspace_bytes: int
    state_slots: int = 0
    """Of recurrent states: more than sequences, or none."""


class DeviceMemory:
    """The device's budget and what each model holds of it; used by two threads.

    *measured_free* asks the device for what is really free, where that can be asked.
    """

    def __init__(
        self, total_bytes: int, measured_free: Callable[[], int | None] = lambda: None
    ) -> None:
        self.total_bytes = total_bytes
        self._measured_free = measured_free
        self._held: dict[str, Footprint] = {}
        self._lock = threading.Lock()

    @property
    def held(self) -> dict[str, Footprint]:
        """What each model holds."""
        with self._lock:
            return dict(self._held)

    def free_bytes(self, unbooked_bytes: int = 0) -> int:
        """Return what is left for more; *unbooked_bytes* are allocated but not held yet."""
        booked = sum(footprint.total_bytes for footprint in self.held.values())
        budget = self.total_bytes - booked - unbooked_bytes
        measured = self._measured_free()
        return max(0, budget if measured is None else min(budget, measured))

    def hold(self, model: str, footprint: Footprint) -> None:
        """Book what *model* takes."""
        with self._lock:
            self._held[model] = footprint

    def release(self, model: str) -> None:
        """Forget what *model* took."""
        with self._lock:
            self._held.pop(model, None)


def refuse_bad_load(command: LoadModel) -> None:
    """Raise Refused for what cannot be meant, before anything is read."""
    if command.dtype not in DTYPES:
        raise Refused("unknown_dtype", f"dtype {command.dtype!r} is not one of {', '.join(DTYPES)}")
    for name in ("max_context_tokens", "max_sequences", "kv_cache_bytes"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise Refused("invalid_limits", f"{name} is {value}; it must be at least 1")


def settle(command: LoadModel, needs: Needs, free_bytes: int) -> Limits:
    """Decide context, seats and blocks within *free_bytes*; raise Refused with the numbers."""
    asked = command.max_context_tokens
    if asked is not None and asked > needs.max_position_embeddings:
        raise Refused(
            "context_too_long",
            f"max_context_tokens is {asked}, "
            f"the model was made for {needs.max_position_embeddings}",
        )
    if command.kv_cache_bytes is not None:
        return _exactly(command, command.kv_cache_bytes, needs, free_bytes)
    return _fairly(command, needs, free_bytes)


@dataclass(frozen=True, slots=True)
class _Seats:
    """How many sequences there are, and what their states and some snapshots take."""

    sequences: int
    slots: int
    bytes: int

    @property
    def words(self) -> str:
        """What a refusal says of the states, if there are any."""
        if not self.slots:
            return ""
        return (
            f", recurrent states of {mebibytes(self.bytes)} "
            f"(sequences: {self.sequences}, snapshots: {self.slots - self.sequences})"
        )


def _seats(command: LoadModel, needs: Needs, cache_bytes: int, context_bytes: int) -> _Seats:
    """Decide the seats of a cache of *cache_bytes*, of which a context takes *context_bytes*."""
    if not needs.state_bytes:
        return _Seats(command.max_sequences or DEFAULT_SEQUENCES, 0, 0)
    affordable = min(cache_bytes // STATES_SHARE, cache_bytes - context_bytes) // needs.state_bytes
    sequences, slots = state_slots(affordable, command.max_sequences)
    return _Seats(sequences, slots, slots * needs.state_bytes)


def _exactly(command: LoadModel, kv_cache_bytes: int, needs: Needs, free_bytes: int) -> Limits:
    least = min(MINIMUM_CONTEXT_TOKENS, command.max_context_tokens or needs.max_position_embeddings)
    least_bytes = _blocks_bytes(needs, least)
    seats = _seats(command, needs, kv_cache_bytes, least_bytes)
    blocks = max(0, kv_cache_bytes - seats.bytes) // needs.block_bytes
    held_tokens = blocks * needs.block_tokens
    context = command.max_context_tokens or min(needs.max_position_embeddings, held_tokens)
    if held_tokens < least:
        raise Refused(
            "insufficient_memory",
            f"kv_cache_bytes {kv_cache_bytes} holds {held_tokens} tokens; "
            f"{least} are the least that is useful, and take {least_bytes}{seats.words}",
            **_numbers(needs, least_bytes + seats.bytes, needs.workspace_bytes(least), free_bytes),
        )
    workspace = needs.workspace_bytes(min(context, held_tokens))
    cache_bytes = blocks * needs.block_bytes + seats.bytes
    if cache_bytes + workspace > free_bytes:
        raise Refused(
            "insufficient_memory",
            f"a KV cache of {mebibytes(kv_cache_bytes)} and a workspace of {mebibytes(workspace)} "
            f"do not fit: {mebibytes(free_bytes)} are free beside the weights",
            **_numbers(needs, cache_bytes, workspace, free_bytes),
        )
    return Limits(context, seats.sequences, blocks, workspace, seats.slots)


def _fairly(command: LoadModel, needs: Needs, free_bytes: int) -> Limits:
    wanted = command.max_context_tokens or needs.max_position_embeddings
    least = command.max_context_tokens or min(MINIMUM_CONTEXT_TOKENS, wanted)
    least_bytes, least_workspace = _blocks_bytes(needs, least), needs.workspace_bytes(least)
    seats = _seats(command, needs, free_bytes, least_bytes + least_workspace)
    kv_free_bytes = free_bytes - seats.bytes
    context = min(wanted, _affordable_context(needs, kv_free_bytes))
    if context < least:
        raise Refused(
            "insufficient_memory",
            f"one context of {least} tokens takes a KV cache of {mebibytes(least_bytes)}"
            f"{seats.words} and a workspace of {mebibytes(least_workspace)}: "
            f"{mebibytes(free_bytes)} are free beside the weights",
            **_numbers(needs, least_bytes + seats.bytes, least_workspace, free_bytes),
        )
    tokens = cache_tokens(context, command.max_context_tokens, command.max_sequences)
    workspace = needs.workspace_bytes(context)
    return Limits(
        max_context_tokens=context,
        max_sequences=seats.sequences,
        blocks=min(_blocks(needs, tokens), (kv_free_bytes - workspace) // needs.block_bytes),
        workspace_bytes=workspace,
        state_slots=seats.slots,
    )


def _numbers(needs: Needs, kv_bytes: int, workspace_bytes: int, free_bytes: int) -> dict[str, int]:
    """Return what a refusal was made by; the memory is what there is for weights and all."""
    return {
        "weights_bytes": needs.weights_bytes,
        "kv_bytes": kv_bytes,
        "workspace_bytes": workspace_bytes,
        "memory_bytes": needs.weights_bytes + free_bytes,
    }


def _affordable_context(needs: Needs, free_bytes: int) -> int:
    """Return the longest context, in whole blocks, whose cache and workspace fit."""
    per_block = needs.block_bytes + needs.workspace.bytes_per_context_token * needs.block_tokens
    return max(0, free_bytes - needs.workspace.fixed_bytes) // per_block * needs.block_tokens


def _blocks(needs: Needs, tokens: int) -> int:
    return -(-tokens // needs.block_tokens)


def _blocks_bytes(needs: Needs, tokens: int) -> int:
    return _blocks(needs, tokens) * needs.block_bytes


def mebibytes(size_bytes: int) -> str:
    """Return a size for people."""
    return f"{size_bytes / _MIB:.1f} MiB"
