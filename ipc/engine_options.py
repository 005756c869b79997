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

Attention = Literal["auto", "flash_attn", "torch", "triton", "reference"]


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same for all models of a node; each field as ``[engine]`` has it."""

    batch_invariant: bool = False
    attention: Attention = "auto"
    cuda_graphs: bool = True
    speculation: bool = True
    prefix_cache: bool = True


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
