"""How the engines of a device process compute: settings that travel to it with the fork.

They belong to ``[engine]`` of the neuron's configuration. A CPU has no graphs and no choice of
attention, and what it computes never depends on the batch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

DEFAULT_SEQUENCES = 32
"""That a model computes at a time, unless a load says otherwise."""
SHORT_SEQUENCE_TOKENS = 512
LEAST_SNAPSHOTS = 2
"""Of recurrent states: one of a prompt's end, one of another's or of a head they share."""
MOST_SNAPSHOTS = 16
STATES_SHARE = 4
"""Recurrent states take at most one part in so many of a cache's memory, where nobody asked for
more seats."""

Attention = Literal["auto", "flash_attn", "torch", "triton", "reference"]


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same for all models of a node; each field as ``[engine]`` has it."""

    batch_invariant: bool = False
    attention: Attention = "auto"
    cuda_graphs: bool = True
    speculation: bool = True
    prefix_cache: bool = True


def state_slots(affordable: int, max_sequences: int | None) -> tuple[int, int]:
    """Return how many sequences a model with recurrent states computes at a time, and its slots.

    Each sequence has a slot, and the rest of *affordable* slots hold snapshots, within bounds.
    Seats that nobody asked for are given up before the least number of snapshots, down to one.
    """
    fair = min(DEFAULT_SEQUENCES, max(1, affordable - LEAST_SNAPSHOTS))
    sequences = max_sequences or fair
    snapshots = max(LEAST_SNAPSHOTS, min(MOST_SNAPSHOTS, affordable - sequences))
    return sequences, sequences + snapshots


def cache_tokens(
    context_tokens: int, max_context_tokens: int | None, max_sequences: int | None
) -> int:
    """Return how many tokens a model's KV cache holds where there is room for all of it.

    One full context and a short one for each further sequence; where both limits were asked for, so
    many full contexts.
    """
    sequences = max_sequences or DEFAULT_SEQUENCES
    if max_context_tokens is not None and max_sequences is not None:
        return context_tokens * sequences
    return context_tokens + (sequences - 1) * min(SHORT_SEQUENCE_TOKENS, context_tokens)
