"""The operations of hybrids on a GPU: by our Triton kernels, chunks of prompts by fla where it is.

flash-linear-attention (fla) is tried once, against ``reference_delta``, before it serves. It asks
the device for lengths, so it has no part in steps that are captured; those are never chunks. Any
operation can be given back to the reference by name (``cuda`` says how).
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels import reference_delta
from cortex.models.kernels.reference_delta import DeltaHeads

DELTA_OPERATIONS = {
    "causal_convolution": "triton_convolution",
    "gated_delta_rule": "triton_gated_delta",
    "gated_rms_norm": "triton_gates",
    "sigmoid_multiply": "triton_gates",
}
"""What can be given back, and the module that has the kernel."""

CLOSE = 0.02
"""By how much fla may differ in a trial, whose outputs are below 1: its products are of 16 bits."""

log = logging.getLogger(__name__)


class DeltaKernels(ABC):
    """What ``cuda.CudaKernels`` has for hybrids."""

    @abstractmethod
    def serves(self, operation: str) -> bool:
        """Whether Triton runs and *operation* has not been given back to the reference."""

    def causal_convolution(self, x: Tensor, weight: Tensor, kept: Tensor, batch: Batch) -> Tensor:
        """X [T, C] -> [T, C]; *kept* is [slots, C, kernel - 1]."""
        return self._module("causal_convolution").causal_convolution(x, weight, kept, batch)

    def gated_delta_rule(
        self,
        qkv: Tensor,
        ba: Tensor,
        rate: Tensor,
        bias: Tensor,
        *,
        states: Tensor,
        heads: DeltaHeads,
        batch: Batch,
    ) -> Tensor:
        """[q | k | v] [T, C] and [b | a] [T, 2 V] -> [T, V, value_dim]."""
        module = self._module("gated_delta_rule")
        rule = module.gated_delta_rule
        if module is not reference_delta and module.has_chunks(qkv, batch):
            rule = fla_rule() or rule
        return rule(qkv, ba, rate, bias, states=states, heads=heads, batch=batch)

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """X [T, V, D] and z [T, V * D] -> [T, V * D]."""
        return self._module("gated_rms_norm").gated_rms_norm(x, z, weight, eps)

    def sigmoid_multiply(self, x: Tensor, gate: Tensor) -> Tensor:
        """X [M, K] and a gate [M, K] -> [M, K]."""
        return self._module("sigmoid_multiply").sigmoid_multiply(x, gate)

    def _module(self, operation: str) -> Any:
        if not self.serves(operation):
            return reference_delta
        return importlib.import_module(f"cortex.models.kernels.{DELTA_OPERATIONS[operation]}")


Rule = Callable[..., Tensor]
"""``reference_delta.gated_delta_rule``, by whatever."""


@cache
def fla_rule() -> Rule | None:
    """Return the rule by fla, once tried; None where it is not there, or, with a warning, wrong."""
    try:
        chunk = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ImportError:
        return None
    rule = by_fla(chunk)
    try:
        if difference_in_trial(rule, torch.device("cuda")) < CLOSE:
            return rule
        reason = "its results were wrong"
    except Exception as exc:  # noqa: BLE001 - whatever is the matter, our kernels can do without
        torch.zeros(1, device="cuda").item()  # raises where the device is lost
        reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
    log.warning("flash-linear-attention is not used, our own kernels serve: %s", reason)
    return None


def by_fla(chunk: Callable[..., tuple[Tensor, Tensor]]) -> Rule:
    """Return the rule by fla's ``chunk_gated_delta_rule``, which has states of its own."""

    def rule(
        qkv: Tensor,
        ba: Tensor,
        rate: Tensor,
        bias: Tensor,
        *,
        states: Tensor,
        heads: DeltaHeads,
        batch: Batch,
    ) -> Tensor:
        assert batch.state_slots is not None, "a recurrent layer needs slots"
        q, k, v = reference_delta.split_heads(qkv, heads)
        g, beta = reference_delta.gates(ba, rate, bias)
        lengths = batch.query_starts[1:] - batch.query_starts[:-1]
        goes_on = (batch.context_tokens > lengths)[:, None, None, None]
        out, after = chunk(
            *(x.to(qkv.dtype)[None] for x in (q, k, v)),
            g=g[None],
            beta=beta.to(qkv.dtype)[None],
            scale=1.0,  # queries are scaled already
            initial_state=torch.where(goes_on, states[batch.state_slots], 0.0),  # NaN may lie there
            output_final_state=True,
            cu_seqlens=batch.query_starts.long(),
        )
        states[batch.state_slots] = after.to(states.dtype)
        return out[0].to(qkv.dtype)

    return rule


def difference_in_trial(rule: Rule, device: torch.device) -> float:
    """Return how far *rule* is from the reference, in outputs and states; NaN where anything is."""
    heads = DeltaHeads(1, 2, 64, 64)
    seeded = torch.Generator().manual_seed(0)
    tokens, starts = 150, torch.tensor([0, 70, 150], dtype=torch.int32, device=device)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=seeded).to(device)

    qkv = some(tokens, heads.channels).bfloat16()
    ba, rate, bias = some(tokens, 4).bfloat16(), -some(2), some(2)
    integers = torch.zeros(tokens, dtype=torch.int64, device=device)
    batch = Batch(
        *(integers, integers, integers, starts),
        context_tokens=torch.tensor([70, 81], dtype=torch.int32, device=device),
        block_tables=integers[:2, None].int(),
        sampled=integers,
        cache=KVCache([], [], 16),
        state_slots=torch.tensor([2, 0], device=device),
    )
    before = some(3, 2, 64, 64)
    results = []
    for compute in (rule, reference_delta.gated_delta_rule):
        states = before.clone()
        out = compute(qkv, ba, rate, bias, states=states, heads=heads, batch=batch)
        results.append(torch.cat([out.float().flatten(), states.flatten()]))
    return float((results[0] - results[1]).abs().max())
