"""How a model computes on a GPU, where there is a choice. A CPU has none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Execution:
    """The choices; those that serve are the defaults.

    ``attention`` is "flash_attn", "torch", "triton", "reference" or "auto", the first of them that
    is there. Where ``is_batch_invariant``, the bits of a sequence's logits do not depend on what
    else is in the batch. Where ``has_graphs``, decode steps are captured and launched as one.
    """

    attention: str = "auto"
    is_batch_invariant: bool = False
    has_graphs: bool = True


DEFAULT = Execution()
