"""The parameters of a model, empty, and the pieces of the checkpoint that fill them.

A piece is some rows of a part; what changes on its way there, ``landing`` changes. Places are made
before anything is read, and no more than one piece for each reader is ever held twice.

What is quantised of a dense checkpoint are the matrices that ranks split, experts among them, and a
head of its own. As stored stay the embedding, of which a step reads a few rows only, and a head
tied to it; what every rank holds whole, such as a router, which is small and decides much; and rows
that are no whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import lcm

import torch
from torch import Tensor, nn

from cortex.models import host_memory
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.checkpoints.quantized import FP8_TENSOR
from cortex.models.checkpoints.tensors import FP8
from cortex.models.landing import Keep, Landing, Tile
from cortex.models.layers import RMSNorm, Vector
from cortex.models.linear import Embedding, Projection, Replicated
from cortex.models.packed_cache import NewFile, PackedFile
from cortex.models.parallel import Cut
from cortex.models.quantization import (
    DENSE,
    DENSE_NAMES,
    STORED,
    ExpertMatrix,
    Matrix,
    Part,
    row_bytes,
)
from cortex.models.sources import Source, Sources
from cortex.models.staging import Piece
from cortex.models.tensor_reader import PIECE_BYTES

TILE_ROWS = 16  # as in quantized_tiles.c
QUANTISED_BYTES = 1 << 21  # of a piece that is quantised, which takes several times as much

Change = Callable[[Tensor], None]
"""Changes floats in place."""


@dataclass(frozen=True, slots=True)
class Form:
    """What weights become."""

    width: torch.dtype  # of activations, and of dense weights where that is 16 bits
    head_dim: int
    device: torch.device
    tile: Tile | None = None
    quant: str | None = None  # the type that dense weights are quantised to

    def kind(self, stored: str, columns: int, *, may_quantise: bool) -> str:
        """Return what rows of *columns* elements stored as *stored* become."""
        if stored == FP8_TENSOR:
            return FP8.name
        if stored not in DENSE:
            return stored
        if may_quantise and self.quant and columns % STORED[self.quant].block_elements == 0:
            return self.quant
        return stored if self.width == torch.float32 else DENSE_NAMES[self.width]


@dataclass(frozen=True, slots=True)
class Kept:
    """What quantising gave before, to be read, or else a file to write it to, if there is one."""

    found: PackedFile | None = None
    new: NewFile | None = None


class Filler:
    """Makes places for the parameters of a model, and says what belongs there."""

    def __init__(self, sources: Sources, form: Form, kept: Kept = Kept()) -> None:
        self._sources = sources
        self._form = form
        self._kept = kept
        self._stays_dense: set[Matrix] = set()

    def fill(self, module: nn.Module) -> list[Piece]:
        """Give every parameter of *module* its place; it is filled once the pieces are there."""
        self._stays_dense = {
            child.weight for child in module.modules() if isinstance(child, (Embedding, Replicated))
        }
        pieces = [
            piece for name, child in module.named_modules() for piece in self._pieces(name, child)
        ]
        self._sources.check_all_used()
        return pieces

    def _pieces(self, name: str, child: nn.Module) -> Iterator[Piece]:
        match child:
            case Matrix():
                yield from self._matrix(name, child)
            case RMSNorm():
                sources = self._sources.vector(f"{name}.weight", Cut.whole(child.size))
                is_less_one = child.is_centred and not self._sources.is_gguf
                child.weight = self._empty_floats(sources)
                yield from _pieces_of_floats(
                    sources, child.weight, _add_one if is_less_one else None
                )
            case Vector():
                full_name = ".".join(filter(None, (name, child.kind)))
                sources = self._sources.vector(full_name, child.rows, *child.rest)
                value = self._empty_floats(sources)
                child.value = value.view(child.rows.size, *child.rest)
                change = _minus_exp if child.is_log and not self._sources.is_gguf else None
                yield from _pieces_of_floats(sources, value, change)
            case Projection() if child.bias is not None:
                sources = self._sources.bias(name, child.weight.stacked)
                child.bias = self._empty_floats(sources)
                yield from _pieces_of_floats(sources, child.bias)

    def _matrix(self, name: str, matrix: Matrix) -> Iterator[Piece]:
        """Fill *matrix* with one part of each run of tensors of the same type."""
        parts = list[Part]()
        for stored, group in groupby(
            self._sources.matrix(name, matrix), key=lambda source: source.tensor.type
        ):
            sources = list(group)
            may_quantise = matrix not in self._stays_dense
            kind = self._form.kind(stored, matrix.columns, may_quantise=may_quantise)
            part = self._empty_part(kind, sources, matrix)
            if stored in DENSE and kind not in DENSE:
                yield from self._quantised(f"{name}/{len(parts)}", sources, part)
            else:
                yield from self._pieces_of_part(sources, part)
            parts.append(part)
        if isinstance(matrix, ExpertMatrix) and len(parts) > 1:
            kinds = ", ".join(part.kind for part in parts)
            raise CheckpointError(f"the experts of {name} are of more than one type: {kinds}")
        matrix.fill(parts)

    def _empty_part(self, kind: str, sources: Sequence[Source], matrix: Matrix) -> Part:
        rows = sum(source.rows for source in sources)
        is_tiled = self._form.tile is not None and kind not in DENSE
        if isinstance(matrix, ExpertMatrix):
            is_tiled &= matrix.stacked[0].size % TILE_ROWS == 0  # no tile of two experts
        padded = -(-rows // TILE_ROWS) * TILE_ROWS if is_tiled else rows
        size = row_bytes(kind, matrix.columns)
        data = host_memory.empty(padded * size, self._form.device).view(padded, size)
        is_planar = self._form.device.type == "cuda" and kind not in DENSE
        return Part(kind, data, rows if is_tiled else None, is_planar)

    def _quantised(self, name: str, sources: Sequence[Source], part: Part) -> Iterator[Piece]:
        """Read what is kept of *part*, or quantise it and keep that."""
        if self._kept.found:
            size = part.data.size(1)
            runs = self._kept.found.runs(name, part.kind, part.rows, size)
            for run in runs:
                yield self._piece((run.source,), part, run.source.first, check=run.check)
            return
        if self._kept.new:
            self._kept.new.add(name, part.kind, part.rows, part.data.size(1))
        for first, some in self._runs(sources, part, QUANTISED_BYTES):
            keep = partial(self._kept.new.write, name, first) if self._kept.new else None
            yield self._piece(some, part, first, keep=keep)

    def _pieces_of_part(self, sources: Sequence[Source], part: Part) -> Iterator[Piece]:
        for first, some in self._runs(sources, part, PIECE_BYTES):
            yield self._piece(some, part, first)

    def _runs(
        self, sources: Sequence[Source], part: Part, nbytes: int
    ) -> Iterator[tuple[int, tuple[Source, ...]]]:
        """Cut *sources* where no head and no tile is cut, with the first row of each run."""
        head_rows = self._form.head_dim if any(source.is_paired for source in sources) else 1
        aligned = lcm(head_rows, 1 if part.kind in DENSE else TILE_ROWS)
        at_once = max(aligned, nbytes // sources[0].kept_bytes // aligned * aligned)
        for number, some in enumerate(_split(sources, at_once)):
            yield number * at_once, some

    def _piece(
        self,
        sources: tuple[Source, ...],
        part: Part,
        first: int,
        *,
        keep: Keep | None = None,
        check: Callable[[memoryview], None] | None = None,
    ) -> Piece:
        """Return the piece that fills *part* from the *first* row on."""
        end = first + sum(source.rows for source in sources)
        place = part.data[first : part.data.size(0) if end == part.rows else end]
        is_as_stored = (
            part.kind == sources[0].tensor.type
            and not (part.is_tiled or part.is_planar)
            and not any(source.is_paired for source in sources)
        )
        if is_as_stored:
            return Piece(sources, into=place, check=check)
        tile = self._form.tile if part.is_tiled else None
        land = Landing(sources, part.kind, place, self._form.head_dim, tile, part.is_planar, keep)
        scales = tuple(source.of_scales() for source in sources if source.scales)
        return Piece((*sources, *scales), land=land, landed_bytes=place.nbytes, check=check)

    def _empty_floats(self, sources: Sequence[Source]) -> Tensor:
        """Return an empty float32 vector for the elements of *sources*."""
        elements = sum(source.nbytes // DENSE[source.tensor.type].itemsize for source in sources)
        return torch.empty(elements, device=self._form.device)


def _pieces_of_floats(
    sources: Sequence[Source], value: Tensor, change: Change | None = None
) -> Iterator[Piece]:
    """Return the pieces that fill *value*, float32, and *change* what is stored."""
    first = 0
    for source in sources:
        dtype = DENSE[source.tensor.type]
        place = value[first : first + source.nbytes // dtype.itemsize]
        first += place.numel()
        land = partial(_land_floats, dtype, place, change)
        yield Piece((source,), land=land, landed_bytes=place.nbytes)


def _land_floats(dtype: torch.dtype, place: Tensor, change: Change | None, stored: Tensor) -> None:
    place.copy_(stored.view(dtype))
    if change:
        change(place)


def _add_one(place: Tensor) -> None:
    place.add_(1.0)


def _minus_exp(place: Tensor) -> None:
    place.exp_().neg_()


def _split(sources: Sequence[Source], rows: int) -> Iterator[tuple[Source, ...]]:
    """Cut *sources* into runs of *rows* rows, the last of what is left."""
    run, room = list[Source](), rows
    for source in sources:
        first = 0
        while first < source.rows:
            count = min(room, source.rows - first)
            run.append(source.part(first, count))
            first += count
            room -= count
            if not room:
                yield tuple(run)
                run, room = [], rows
    if run:
        yield tuple(run)
