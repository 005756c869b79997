"""The small blocks every architecture is built from. Shapes as in ``models.batch``, H hidden."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cortex.models.batch import Batch, CacheShape
from cortex.models.kernels import ops
from cortex.models.linear import ColumnParallel, RowParallel
from cortex.models.parallel import ALONE, Cut, Group


class Decoder(nn.Module, ABC):
    """What every architecture is to those who use it."""

    caches: CacheShape
    """What this rank keeps of a sequence between steps."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [R, V], float32, of the tokens named by ``batch.sampled``."""

    @abstractmethod
    def hidden(self, batch: Batch) -> Tensor:
        """Return what the head would see of every token, [T, H] float32: embeddings pool it."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""

    weight: Tensor  # [size] float32, whatever the activations are; empty until it is loaded

    def __init__(self, size: int, eps: float, *, is_centred: bool = False) -> None:
        """Where *is_centred*, a safetensors checkpoint holds the weight less one."""
        super().__init__()
        self.size = size
        self.eps = eps
        self.is_centred = is_centred
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], or each head by itself, [T, heads, D] -> [T, heads, D]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] and [T, H] -> x + y, and that normalised; a GPU does both in one pass."""
        return ops.add_rms_norm(x, y, self.weight, self.eps)


class Vector(nn.Module):
    """A small parameter that is no matrix: float32 [rows of this rank, *rest].

    In the checkpoint it has the name of its place in the model, and *kind* behind that. Where it
    *is_log*, a safetensors checkpoint holds the logarithm of its negative.
    """

    value: Tensor  # empty until it is loaded

    def __init__(self, rows: Cut, *rest: int, kind: str = "weight", is_log: bool = False) -> None:
        super().__init__()
        self.is_log = is_log
        self.rows = rows
        self.rest = rest
        self.kind = kind
        self.register_buffer("value", torch.empty(0))


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add a block's output y to the residual stream x, [T, H] each."""
    return ops.add(x, y)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Return rows *ids* [R] of x [T, H] -> [R, H]."""
    return ops.take(x, ids)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, group: Group = ALONE) -> None:
        super().__init__()
        inner = group.inner(intermediate_size)
        self.gate_up_proj = ColumnParallel(hidden_size, inner, inner, group=group)
        self.down_proj = RowParallel(inner, hidden_size, group=group)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(ops.silu_multiply(self.gate_up_proj(x)))
