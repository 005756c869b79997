"""What a load would take of each of its devices: from headers, or from an earlier load.

    weights      what the headers say, or what was measured
    KV cache     arithmetic: the smallest that is of use, and the one that it gets where there is
                 room for everything
    workspace    of a step: measured, else estimated

Only a loaded model can be measured: for each token of a step's budget three hidden states and three
of the MLP's are alive at once (measured: 25,600 bytes for SmolLM2-135M in float32, where this says
25,344), beside the logits that tokens are chosen from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cortex.ipc.engine_options import cache_tokens, state_slots
from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.runtime import preflight
from cortex.runtime.config import DeviceSpec

STEP_TOKENS = {"cpu": 128, "cuda": 512}
MANY_SLOTS = 1 << 16
"""Of recurrent states: more than anybody wants."""
BYTES_PER_TOKEN_OF_VOCABULARY = 64 * 8 + 8 * 96
"""Of the logits of a step's rows, and of choosing from eight of them at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of each device."""

    least_bytes: int
    """With less than this it would not be of use."""
    wanted_bytes: int
    """Where there is room for everything."""


def estimate_of(
    checkpoint: Checkpoint, request: LoadRequest, device: DeviceSpec, measured: Footprint | None
) -> Estimate:
    """Return what a load takes; raise Unloadable for what no room on *device* would help.

    *measured* is what an earlier load of the same held on such a device.
    """
    preflight.judge(checkpoint, request, device.memory_bytes, measured)
    kind = device.name.partition(":")[0]
    auto_bytes = preflight.auto_dtype_bytes(checkpoint, is_cpu=kind == "cpu")
    needs = preflight.needs(checkpoint, request, auto_bytes)
    if measured is not None:
        beside_bytes = measured.weights_bytes + measured.workspace_bytes
    else:
        width_bytes = preflight.DTYPE_BYTES.get(request.dtype, auto_bytes)
        workspace = workspace_bytes(checkpoint.config, kind, width_bytes, request.ranks)
        beside_bytes = needs.weights_bytes + workspace
    tokens = cache_tokens(needs.context_tokens, request.max_context_tokens, request.max_sequences)
    _, slots = state_slots(MANY_SLOTS, request.max_sequences)
    kv_bytes = needs.kv_bytes_per_token * tokens + slots * needs.state_bytes
    if request.kv_cache_mb is not None:
        kv_bytes = needs.smallest_kv_bytes
    return Estimate(beside_bytes + needs.smallest_kv_bytes, beside_bytes + kv_bytes)


def workspace_bytes(config: Mapping[str, Any], kind: str, width_bytes: int, ranks: int = 1) -> int:
    """Estimate what a step takes beside weights and cache; every rank has all logits."""
    hidden, middle, vocab = (
        value if type(value := config.get(name)) is int else 0
        for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    step = STEP_TOKENS[kind] * 3 * (hidden + middle // ranks) * width_bytes
    return step + vocab * BYTES_PER_TOKEN_OF_VOCABULARY
