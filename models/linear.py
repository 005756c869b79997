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
    """y = x W^T, without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = Matrix(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        return ops.linear(x, self.weight.parts)


class ColumnParallel(Projection):
    """A projection that ranks split by its outputs."""


class RowParallel(Projection):
    """A projection that ranks split by its inputs, so that their outputs must be summed."""


class Embedding(nn.Module):
    """Token ids [T] to vectors [T, H] of the activations' dtype."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = Matrix(rows, size)
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]; raises IndexError for an id that is not in the vocabulary."""
        return ops.rows(self.weight, token_ids).to(self.dtype)
