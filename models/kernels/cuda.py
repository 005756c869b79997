"""The operations on a GPU: products by torch's libraries, the rest by Triton kernels of our own.

Each method returns what its namesake in ``reference`` returns, to rounding. Nothing here asks the
device for a value, so that a step can be captured in a CUDA graph; where the attention is the
reference, it does ask, and the step cannot be captured.

Where Triton cannot run (it is not installed, or lacks the C compiler it builds its launchers with),
torch's own operators serve and one warning says so. Any operation can be given back to the
reference by name, to find out which kernel is wrong or what it gains:

    CORTEX_REFERENCE_OPERATIONS=rms_norm,silu_multiply,rotate_and_store,add_bias
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.execution import Execution
from cortex.models.kernels import reference
from cortex.models.kernels.cuda_attention import Shape, attention_for
from cortex.models.kernels.cuda_delta import DELTA_OPERATIONS, DeltaKernels, fla_rule
from cortex.models.quantization import ExpertMatrix, Part

REFERENCE_OPERATIONS = "CORTEX_REFERENCE_OPERATIONS"
TRITON_OPERATIONS = frozenset(
    {
        *("rms_norm", "silu_multiply", "rotate_and_store", "add_bias"),
        *("quantized_linear", "experts", "route"),
        *DELTA_OPERATIONS,
    }
)
"""What can be given back; ``add_rms_norm`` goes with ``rms_norm``, and looking up quantised rows
with ``quantized_linear``."""

BLOCK_TOKENS = 16  # positions of a block of the cache, for which kernels are tried
TRIED_COLUMNS = 96
PREPARED_ROWS = 1 << 14  # of a matrix: a larger one is multiplied in the same way

log = logging.getLogger(__name__)


class CudaKernels(DeltaKernels):
    """The operations of one process's GPU; *triton_ops* is that module, None where it cannot run.

    Operations in *given_back* are the reference's.
    """

    def __init__(self, triton_ops: Any, given_back: frozenset[str] = frozenset()) -> None:
        self._triton_ops = triton_ops
        self._given_back = given_back

    def linear(
        self, x: Tensor, parts: Sequence[Part], *, is_batch_invariant: bool = False
    ) -> Tensor:
        """X [M, K] times the transpose of the stacked parts [N, K] -> [M, N]."""
        if not is_batch_invariant and not any(map(self.reads_packed, parts)):
            return reference.linear(x, parts)
        x = x.contiguous()
        y = torch.empty(
            (x.size(0), sum(part.rows for part in parts)), dtype=x.dtype, device=x.device
        )
        first = 0
        for part in parts:
            columns = y[:, first : first + part.rows]
            self._linear_into(columns, x, part, is_batch_invariant=is_batch_invariant)
            first += part.rows
        return y

    def _linear_into(self, y: Tensor, x: Tensor, part: Part, *, is_batch_invariant: bool) -> None:
        if self.reads_packed(part):
            from cortex.models.kernels import triton_quantized

            triton_quantized.linear_into(y, x, part, is_batch_invariant=is_batch_invariant)
        elif is_batch_invariant:
            from cortex.models.kernels import triton_linear

            first = 0
            for weights in reference.weights(part, x.size(1), x.dtype):
                triton_linear.linear_into(y[:, first : first + weights.size(0)], x, weights)
                first += weights.size(0)
        else:
            y.copy_(reference.linear(x, [part]))

    def rows(self, part: Part, ids: Tensor) -> Tensor:
        """Unpack rows *ids* [T] to float32 [T, K]; quantised ones beyond the matrix are zeros."""
        if not self.reads_packed(part):
            return reference.rows(part, ids)
        return self.rows_of_share(part, ids, 0, part.rows)

    def rows_of_share(self, part: Part, ids: Tensor, first: int, of: int) -> Tensor:
        """Unpack rows *ids* [T] of *of*, of which *part* holds those from *first* on."""
        if not self.reads_packed(part):
            return reference.rows_of_share(part, ids, first, of)
        from cortex.models.kernels import triton_quantized

        return triton_quantized.rows(part, ids, first)

    def route(self, logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
        """Router logits [T, E] -> ids [T, k] int64 and weights [T, k] float32."""
        if not self.serves("route"):
            return reference.route(logits, top_k, is_normalised=is_normalised)
        from cortex.models.kernels import triton_experts

        return triton_experts.route(logits, top_k, is_normalised=is_normalised)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        gate: ExpertMatrix,
        up: ExpertMatrix,
        down: ExpertMatrix,
        is_batch_invariant: bool = False,
    ) -> Tensor:
        """X [T, H] through the SwiGLUs *ids* [T, k], summed with *weights* [T, k] -> [T, H]."""
        matrices = {"gate": gate, "up": up, "down": down}
        if self.serves("experts"):
            from cortex.models.kernels import triton_experts

            if triton_experts.can_compute(**matrices):
                return triton_experts.experts(
                    x, ids, weights, **matrices, is_batch_invariant=is_batch_invariant
                )
        return reference.experts(x, ids, weights, **matrices)

    def reads_packed(self, part: Part) -> bool:
        """Whether products with *part* are those of ``triton_quantized``."""
        return part.is_planar and self.serves("quantized_linear")

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """[M, N] + float32 [N] -> [M, N] in the dtype of *y*."""
        return self._for("add_bias").add_bias(y, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., K] -> [..., K] of two or three dimensions."""
        return self._for("rms_norm").rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """[M, K] and [M, K] -> their sum, and that normalised."""
        return self._for("rms_norm").add_rms_norm(x, y, weight, eps)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """[M, 2 K] -> [M, K]."""
        return self._for("silu_multiply").silu_multiply(gate_up)

    def rotate_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosines: Tensor,
        sines: Tensor,
        *,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """Q [T, N, D] turned; k, turned, and v [T, K, D] written to their slots."""
        operations = self._for("rotate_and_store")
        return operations.rotate_and_store(
            q, k, v, cosines, sines, keys=keys, values=values, slots=slots
        )

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """Q [T, N, D] against one layer's cache -> [T, N, D]."""
        attend = attention_for(Shape.of(q, keys), batch.cache.execution)
        return attend(q, keys, values, batch, scale)

    def serves(self, operation: str) -> bool:
        """Whether Triton runs and *operation* has not been given back to the reference."""
        return self._triton_ops is not None and operation not in self._given_back

    def _for(self, operation: str) -> Any:
        return self._triton_ops if self.serves(operation) else reference


def kernels_for(x: Tensor) -> CudaKernels | None:
    """Return the kernels if *x* lies on a GPU and is of a width they know."""
    return kernels() if x.is_cuda and x.dtype in reference.FLOATS else None


def kernels_for_rows(part: Part) -> CudaKernels | None:
    """Return the kernels if *part* lies on a GPU."""
    return kernels() if part.data.is_cuda else None


@cache
def kernels() -> CudaKernels:
    """Return the kernels of this process, once tried; asks the device, so call it before a step."""
    return CudaKernels(_working_triton_ops(torch.device("cuda")), _given_back(os.environ))


def prepare(shape: Shape, execution: Execution, *, has_states: bool = False) -> None:
    """Choose, compile and try what a model of *shape* needs, before its first step.

    Raises ``cuda_attention.Unavailable`` where *execution* cannot be had.
    """
    serves_chunks = kernels().serves("gated_delta_rule") and not execution.is_batch_invariant
    attention_for(shape, execution)
    if has_states and serves_chunks:
        fla_rule()


def prepare_products(
    parts: Iterable[Part], dtype: torch.dtype, *, is_batch_invariant: bool
) -> None:
    """Compile the products of activations of *dtype* with every type and shape of packed rows."""
    from cortex.models.kernels.triton_quantized import EVERY_WAY

    packed = {(p.kind, p.rows, p.columns): p for p in parts if kernels().reads_packed(p)}
    for part in packed.values():
        some = replace(part, data=part.data[:PREPARED_ROWS])
        for rows in EVERY_WAY:
            x = torch.zeros(rows, part.columns, dtype=dtype, device=part.data.device)
            kernels().linear(x, [some], is_batch_invariant=is_batch_invariant)


def prepare_experts(
    layers: Iterable[Mapping[str, ExpertMatrix]], dtype: torch.dtype, *, is_batch_invariant: bool
) -> None:
    """Compile what *layers* need, each a gate, up and down, once for each type and shape."""
    if not kernels().serves("experts"):
        return
    from cortex.models.kernels import triton_experts

    different = {
        tuple((p.kind, p.rows, p.columns) for matrix in layer.values() for p in matrix.parts): layer
        for layer in layers
        if triton_experts.can_compute(**layer)
    }
    for layer in different.values():
        triton_experts.prepare(**layer, dtype=dtype, is_batch_invariant=is_batch_invariant)


def _given_back(environment: Any) -> frozenset[str]:
    """Return the operations that the environment gives to the reference; raises ValueError."""
    named = frozenset(filter(None, environment.get(REFERENCE_OPERATIONS, "").split(",")))
    if unknown := named - TRITON_OPERATIONS:
        raise ValueError(
            f"{REFERENCE_OPERATIONS}: {', '.join(sorted(unknown))} is none of "
            f"{', '.join(sorted(TRITON_OPERATIONS))}"
        )
    return named


def _working_triton_ops(device: torch.device) -> Any:
    """Return the module, or None and one warning where its simplest kernel does not run."""
    x = torch.ones((1, TRIED_COLUMNS), device=device)
    try:
        operations = importlib.import_module("cortex.models.kernels.triton_ops")
        if torch.equal(operations.add_bias(x, x[0]), x + x):
            return operations
        reason = "a sum was wrong"
    except Exception as exc:  # noqa: BLE001 - whatever is missing, torch can do without
        torch.zeros(1, device=device).item()  # raises where the device is lost
        reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
    log.warning("Triton does not run here, torch's operators serve, which is slower: %s", reason)
    return None
