"""Matrices that stay in memory as their checkpoint stores them.

A row is a run of blocks of 32 elements that share a scale d and, in Q4_1 and Q5_1, a minimum m,
both float16; the first 16 elements of a block are the low halves of its bytes, the others the high
halves, and bit i of h is the fifth of element i (ggml-common.h of ggml-org/llama.cpp;
dequantize_row_q4_0 and its neighbours):

    type  bytes of a block                          element
    Q4_0  d, 16 bytes of nibbles                    (q - 8) * d
    Q4_1  d, m, 16 bytes of nibbles                 q * d + m
    Q5_0  d, h of 4 bytes, 16 bytes of nibbles      (q - 16) * d
    Q5_1  d, m, h of 4 bytes, 16 bytes of nibbles   q * d + m
    Q8_0  d, 32 signed bytes                        q * d

F32, F16 and BF16 are rows of such elements. Blocks never cross rows, so rows can be stacked,
reordered and looked up without unpacking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from cortex.models.checkpoints.tensors import GGUF_TYPES, LOADABLE

STORED = {stored.name: stored for stored in GGUF_TYPES.values() if stored.name in LOADABLE}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DENSE_NAMES = {dtype: name for name, dtype in DENSE.items()}


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of *columns* elements stored as *kind*."""
    stored = STORED[kind]
    return columns // stored.block_elements * stored.block_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one stored type: *data* is uint8 [rows, bytes of a row].

    Where ``tiled_rows`` is given, *data* are that many rows in the tiles of quantized_linear.c,
    padded to whole ones.
    """

    kind: str
    data: Tensor
    tiled_rows: int | None = None

    @property
    def is_tiled(self) -> bool:
        """Whether its blocks lie in tiles."""
        return self.tiled_rows is not None

    @property
    def rows(self) -> int:
        """How many rows of the matrix this part holds."""
        return self.data.size(0) if self.tiled_rows is None else self.tiled_rows

    @property
    def columns(self) -> int:
        """Elements of a row."""
        stored = STORED[self.kind]
        return self.data.size(1) // stored.block_bytes * stored.block_elements


class Matrix(nn.Module):
    """A weight [rows, columns], in one part per stored type, stacked along the rows.

    *stacked* are the rows of each matrix it is made of. Empty until ``fill``; a matrix used in two
    places (tied embeddings) is one object.
    """

    def __init__(self, stacked: tuple[int, ...], columns: int) -> None:
        super().__init__()
        self.stacked = stacked
        self.rows = sum(stacked)
        self.columns = columns
        self.parts: tuple[Part, ...] = ()

    def fill(self, parts: Sequence[Part]) -> None:
        """Take the weights."""
        assert sum(part.rows for part in parts) == self.rows
        assert all(part.data.size(1) == row_bytes(part.kind, self.columns) for part in parts)
        self.parts = tuple(parts)

    @property
    def bytes(self) -> int:
        """Memory the weights take."""
        return sum(part.data.numel() for part in self.parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002 - torch passes it
        """Follow ``module.to(device)``; to torch the rows are bytes, so no dtype changes them."""
        self.parts = tuple(Part(part.kind, fn(part.data), part.tiled_rows) for part in self.parts)
        return self
