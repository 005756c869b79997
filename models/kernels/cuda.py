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
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.execution import Execution
from cortex.models.kernels import reference
from cortex.models.kernels.cuda_attention import Shape, attention_for
from cortex.models.quantization import Part

REFERENCE_OPERATIONS = "CORTEX_REFERENCE_OPERATIONS"
TRITON_OPERATIONS = frozenset({"rms_norm", "silu_multiply", "rotate_and_store", "add_bias"})
"""What can be given back; ``add_rms_norm`` goes with ``rms_norm``."""

BLOCK_TOKENS = 16  # positions of a block of the cache, for which kernels are tried
TRIED_COLUMNS = 96

log = logging.getLogger(__name__)


class CudaKernels:
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
        if not is_batch_invariant:
            return reference.linear(x, parts)
        from cortex.models.kernels import triton_linear

        x = x.contiguous()
        y = torch.empty(
            (x.size(0), sum(part.rows for part in parts)), dtype=x.dtype, device=x.device
        )
        first = 0
        for part in parts:
            for weights in reference.weights(part, x.size(1), x.dtype):
                columns = y[:, first : first + weights.size(0)]
                triton_linear.linear_into(columns, x, weights)
                first += weights.size(0)
        return y

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

    def _for(self, operation: str) -> Any:
        if self._triton_ops is None or operation in self._given_back:
            return reference
        return self._triton_ops


def kernels_for(x: Tensor) -> CudaKernels | None:
    """Return the kernels if *x* lies on a GPU and is of a width they know."""
    return kernels() if x.is_cuda and x.dtype in reference.FLOATS else None


@cache
def kernels() -> CudaKernels:
    """Return the kernels of this process, once tried; asks the device, so call it before a step."""
    return CudaKernels(_working_triton_ops(torch.device("cuda")), _given_back(os.environ))


def prepare(shape: Shape, execution: Execution) -> None:
    """Choose, compile and try what a model of *shape* needs, before its first step.

    Raises ``cuda_attention.Unavailable`` where *execution* cannot be had.
    """
    kernels()
    attention_for(shape, execution)


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
