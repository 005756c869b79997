"""Projections and the embedding: what multiplies with a ``Matrix``.

Which of its dimensions tensor parallelism splits is a property of the class an architecture
chooses. There is one rank so far, which holds the whole of both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cortex.models.kernels import ops
from cortex.models.quantization import Matrix


class Projection(nn.Module):
    """y = x W^T or, with a bias, x W^T + b; projections of the same x may be stacked into one."""

    bias: Tensor | None  # [out] float32, whatever the activations are; empty until it is loaded

    def __init__(self, in_features: int, *out_features: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = Matrix(out_features, in_features)
        self.is_batch_invariant = False  # weights.py knows
        self.register_buffer("bias", torch.empty(0) if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        y = ops.linear(x, self.weight.parts, is_batch_invariant=self.is_batch_invariant)
        return y if self.bias is None else ops.add_bias(y, self.bias)


class ColumnParallel(Projection):
    """A projection that ranks split by its outputs."""


class RowParallel(Projection):
    """A projection that ranks split by its inputs, so that their outputs must be summed."""


class Embedding(nn.Module):
    """Token ids [T] to vectors [T, H] of the activations' dtype."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = Matrix((rows,), size)
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]; raises IndexError for an id that is not in the vocabulary."""
        return ops.rows(self.weight, token_ids).to(self.dtype)
