"""The small blocks every architecture is built from. Shapes as in ``models.batch``, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cortex.models.kernels import ops
from cortex.models.linear import ColumnParallel, RowParallel


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""

    weight: Tensor  # [H] float32, whatever the activations are

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return ops.rms_norm(x, self.weight, self.eps)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add a block's output y to the residual stream x, [T, H] each."""
    return ops.add(x, y)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = ColumnParallel(hidden_size, 2 * intermediate_size)
        self.down_proj = RowParallel(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(ops.silu_multiply(self.gate_up_proj(x)))
