"""Matrices that stay in memory as their checkpoint stores them.

A row is a run of blocks that never cross rows, so rows can be stacked, reordered and looked up
without unpacking. F32, F16 and BF16 are rows of such elements. Numbers of several bytes are little
endian, d and m float16 (ggml-common.h of ggml-org/llama.cpp; dequantize_row_q4_0 and its
neighbours). A block of 32 elements, in the order of its bytes:

    type    bytes of a block                          element
    Q4_0    d, 16 bytes of nibbles                    (q - 8) * d
    Q4_1    d, m, 16 bytes of nibbles                 q * d + m
    Q5_0    d, h of 4 bytes, 16 bytes of nibbles      (q - 16) * d
    Q5_1    d, m, h of 4 bytes, 16 bytes of nibbles   q * d + m
    Q8_0    d, 32 signed bytes                        q * d
    IQ4_NL  d, 16 bytes of nibbles                    CURVE[q] * d

The first 16 elements are the low halves of the nibbles' bytes, the others the high halves; bit i of
h is the fifth of element i. A block of 256 has scales s, and some minima t, of its own for every 16
or 32 elements:

    type    bytes of a block                                           element             for
    Q2_K    16 of s (low halves) and t (high), 64 of q, d, m           q * (d s) - m t      16
    Q3_K    h of 32 bytes, 64 of q, 12 of s, d                         (q - 4) * d (s - 32) 16
    Q4_K    d, m, 12 of s and t, 128 of q                              q * (d s) - m t      32
    Q5_K    d, m, 12 of s and t, h of 32 bytes, 128 of q               q * (d s) - m t      32
    Q6_K    128 of q, 64 of q's two high bits, 16 signed bytes s, d    (q - 32) * (d s)     16
    IQ4_XS  d, 2 of s's high bits, 4 of its low halves, 128 of q       CURVE[q] * d (s - 32) 32

How their bits are spread is in ``kernels.blocks``. Our own type, of blocks of 128 elements:

    FP8     a float32 scale, 128 floats of 8 bits (e4m3fn)             q * scale
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from cortex.models.checkpoints.tensors import FP8, GGUF_TYPES, LOADABLE
from cortex.models.parallel import Cut

STORED = {
    **{stored.name: stored for stored in GGUF_TYPES.values() if stored.name in LOADABLE},
    FP8.name: FP8,
}
"""The types of weights in memory."""

CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL and IQ4_XS stand for: denser around zero, as weights are."""

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DENSE_NAMES = {dtype: name for name, dtype in DENSE.items()}


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of *columns* elements stored as *kind*."""
    stored = STORED[kind]
    return columns // stored.block_elements * stored.block_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one stored type: *data* is uint8 [rows, bytes of a row].

    Where ``tiled_rows`` is given, *data* are that many rows in the tiles of quantized_tiles.c,
    padded to whole ones. Where it *is_planar*, every row is in the order of ``kernels.planes``.
    """

    kind: str
    data: Tensor
    tiled_rows: int | None = None
    is_planar: bool = False

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

    *stacked* are the rows of each tensor it is made of, as far as this rank holds them, *cut* its
    columns. Empty until ``fill``; a matrix used in two places (tied embeddings) is one object.
    """

    def __init__(self, stacked: tuple[Cut, ...], cut: Cut) -> None:
        super().__init__()
        self.stacked = stacked
        self.cut = cut
        self.rows = sum(rows.size for rows in stacked)
        self.columns = cut.size
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
        self.parts = tuple(replace(part, data=fn(part.data)) for part in self.parts)
        return self


class ExpertMatrix(Matrix):
    """The matrices [rows, columns] of all experts, one after the other along the rows.

    Of one stored type, so there is one part. Tensors in a checkpoint: one of three dimensions
    [experts, rows, columns] (GGUF), or one of two per expert.
    """

    def __init__(self, experts: int, rows: Cut, cut: Cut) -> None:
        super().__init__(tuple(rows for _ in range(experts)), cut)
        self.experts = experts

    def expert(self, index: int) -> Part:
        """Return the rows of one expert, as long as they lie in no tiles."""
        (part,) = self.parts
        assert not part.is_tiled
        rows = self.rows // self.experts
        return replace(part, data=part.data[index * rows : (index + 1) * rows])
