"""Rows as a checkpoint stores them, brought to what they stay as and to where they stay.

    as stored ── rotary pairs to halves ── 16-bit width, FP8 blocks, or quantised ── tiles, planes
                                                                  └► packed_cache         └► place

Each step is left out that changes nothing. On a CPU numpy moves bytes: torch would share that among
threads that spin while they wait, and beside a busy process a load then took 1.3 s of processor
time instead of 0.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cortex.models.checkpoints.quantized import BLOCK, FP8_TENSOR
from cortex.models.checkpoints.tensors import FP8
from cortex.models.kernels.planes import planar
from cortex.models.kernels.quantize import quantize
from cortex.models.quantization import DENSE, Part
from cortex.models.sources import Source

SHARED_ELEMENTS = (1 << 15) - 1  # more of them torch shares among threads

Tile = Callable[[str, Tensor, Tensor], None]
"""Puts rows of a kind, [rows, bytes], into as many tiles as they need."""

Keep = Callable[[Tensor], None]
"""Writes packed rows to where the next load finds them."""


@dataclass(frozen=True, slots=True)
class Landing:
    """The way of the rows of *sources*, one after the other, to *place* as *kind*."""

    sources: tuple[Source, ...]
    kind: str
    place: Tensor  # [rows or those of their tiles, bytes]
    head_dim: int
    tile: Tile | None
    is_planar: bool
    keep: Keep | None = None

    def __call__(self, stored: Tensor) -> None:
        """Bring *stored*, which may be changed, to its place; scales lie behind the rows."""
        weights_bytes = sum(source.nbytes for source in self.sources)
        rows = stored[:weights_bytes].view(-1, self.sources[0].kept_bytes)
        self._make_halves_of_pairs(rows)
        packed = self._packed(rows, stored[weights_bytes:])
        if self.keep:
            self.keep(packed)
        if self.tile:
            self.tile(self.kind, packed, self.place)
        elif self.is_planar:
            self.place.copy_(planar(Part(self.kind, packed)).data)
        else:
            _put(self.place, packed)

    def _packed(self, rows: Tensor, scales: Tensor) -> Tensor:
        stored = self.sources[0].tensor.type
        if stored == self.kind:
            return rows
        if stored == FP8_TENSOR:
            return self._with_scales(rows, scales)
        weights = rows.view(DENSE[stored])
        if self.kind in DENSE:
            return weights.to(DENSE[self.kind]).view(torch.uint8)
        return _quantised(self.kind, weights)

    def _with_scales(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Put before every BLOCK elements of a row the scale that they share."""
        packed = rows.new_empty(rows.size(0), rows.size(1) // BLOCK, FP8.block_bytes)
        size = FP8.block_bytes - BLOCK
        _put(packed[..., size:], rows.view(*packed.shape[:2], BLOCK))
        first, at = 0, 0
        for source in self.sources:
            of_rows = source.of_scales()
            assert source.scales is not None
            stored = scales[at : at + of_rows.nbytes].view(of_rows.rows, -1)
            floats = stored.clone().view(DENSE[source.scales.type]).float()  # [rows / BLOCK, ...]
            at += of_rows.nbytes
            skipped = source.first % BLOCK
            by_row = floats.repeat_interleave(BLOCK, 0)[skipped : skipped + source.rows]
            by_bytes = by_row[..., None].contiguous().view(torch.uint8)
            _put(packed[first : first + source.rows, :, :size], by_bytes)
            first += source.rows
        return packed.flatten(1)

    def _make_halves_of_pairs(self, rows: Tensor) -> None:
        first = 0
        for source in self.sources:
            if source.is_paired:
                make_halves_of_pairs(rows[first : first + source.rows], self.head_dim)
            first += source.rows


def make_halves_of_pairs(rows: Tensor, head_dim: int) -> None:
    """Reorder rows [heads * D, bytes] from rotary pairs to rotary halves (see ``models.rope``)."""
    if rows.device.type == "cpu":
        stored = rows.numpy()
        pairs = stored.copy().reshape(-1, head_dim // 2, 2, rows.size(1))  # [heads, D / 2, 2, ...]
        stored[:] = pairs.swapaxes(1, 2).reshape(stored.shape)
    else:
        pairs_there = rows.reshape(-1, head_dim // 2, 2, rows.size(1))
        rows.copy_(pairs_there.transpose(1, 2).flatten(0, 2))


def _quantised(kind: str, weights: Tensor) -> Tensor:
    """Return *weights* [rows, columns] as blocks of *kind*; on a CPU a few rows at a time.

    So they stay in its caches, their intermediate floats small, and torch shares nothing.
    """
    if weights.device.type != "cpu":
        return quantize(kind, weights)
    rows = max(1, SHARED_ELEMENTS // weights.size(1))
    return torch.cat([quantize(kind, some) for some in torch.split(weights, rows)])


def _put(place: Tensor, values: Tensor) -> None:
    """Copy *values* to *place*."""
    if place.device.type == "cpu":
        place.numpy()[:] = values.numpy()
    else:
        place.copy_(values)
