"""Projections and the embedding: what multiplies with a ``Matrix``.

Which of its dimensions tensor parallelism splits is a property of the class an architecture
chooses (``models.parallel``). A size given as a number is shared evenly; what is split otherwise is
given as a ``Cut``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cortex.models.kernels import ops
from cortex.models.parallel import ALONE, Cut, Group
from cortex.models.quantization import Matrix


class Projection(nn.Module):
    """y = x W^T or, with a bias, x W^T + b; projections of the same x may be stacked into one."""

    bias: Tensor | None  # [out] float32, whatever the activations are; empty until it is loaded

    def __init__(self, columns: Cut, rows: tuple[Cut, ...], *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = Matrix(rows, columns)
        self.is_batch_invariant = False  # weights.py knows
        self.register_buffer("bias", torch.empty(0) if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        y = self.product(x)
        return y if self.bias is None else ops.add_bias(y, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out] without the bias, of this rank."""
        return ops.linear(x, self.weight.parts, is_batch_invariant=self.is_batch_invariant)


class Replicated(Projection):
    """A projection that every rank holds whole, of what every rank has."""

    def __init__(self, in_features: int, *out_features: int, has_bias: bool = False) -> None:
        rows = tuple(Cut.whole(size) for size in out_features)
        super().__init__(Cut.whole(in_features), rows, has_bias=has_bias)


class ColumnParallel(Projection):
    """A projection that ranks split by its outputs: each has its own."""

    def __init__(
        self,
        in_features: int,
        *out_features: int | Cut,
        group: Group = ALONE,
        has_bias: bool = False,
    ) -> None:
        rows = tuple(out if isinstance(out, Cut) else group.share(out) for out in out_features)
        super().__init__(Cut.whole(in_features), rows, has_bias=has_bias)


class RowParallel(Projection):
    """A projection that ranks split by its inputs, so that their outputs are summed."""

    def __init__(self, in_features: int | Cut, out_features: int, *, group: Group = ALONE) -> None:
        columns = in_features if isinstance(in_features, Cut) else group.share(in_features)
        super().__init__(columns, (Cut.whole(out_features),))
        self.group = group

    def product(self, x: Tensor) -> Tensor:
        """[M, in of this rank] -> [M, out], the same on every rank."""
        return ops.all_reduce(super().product(x), self.group)


class Embedding(nn.Module):
    """Token ids [T] to vectors [T, H] of the activations' dtype; split by the vocabulary."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, group: Group = ALONE) -> None:
        super().__init__()
        self.weight = Matrix((group.share_where_even(rows),), Cut.whole(size))
        self.dtype = dtype
        self.group = group

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]; raises IndexError for an id that is not in the vocabulary."""
        (cut,) = self.weight.stacked
        if cut.is_whole:
            return ops.rows(self.weight, token_ids).to(self.dtype)
        found = ops.rows_of_share(self.weight, token_ids, cut)
        return ops.all_reduce(found, self.group).to(self.dtype)


class Head(Projection):
    """The projection to the vocabulary, by which ranks split it; each gets all logits."""

    def __init__(self, in_features: int, rows: int, group: Group = ALONE) -> None:
        super().__init__(Cut.whole(in_features), (group.share_where_even(rows),))
        self.group = group

    def product(self, x: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        y = super().product(x)
        (cut,) = self.weight.stacked
        return y if cut.is_whole else ops.all_gather(y, self.group)
