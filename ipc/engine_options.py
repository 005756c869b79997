"""How the engines of a device process compute: settings that travel to it with the fork.

They belong to ``[engine]`` of the neuron's configuration. A CPU has no graphs and no choice of
attention, and what it computes never depends on the batch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Attention = Literal["auto", "flash_attn", "torch", "triton", "reference"]


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same for all models of a node; each field as ``[engine]`` has it."""

    batch_invariant: bool = False
    attention: Attention = "auto"
    cuda_graphs: bool = True
    speculation: bool = True
    prefix_cache: bool = True
