"""Where the bytes of a piece are read to: the place they stay, or a buffer on the way there.

On a CPU what stays as it is stored is read to its place; what changes is read into one buffer and
put in place from there. On a GPU a reader has two buffers of pinned memory, which nobody else can
have, and one is filled while the other is copied:

    file ── read ──► buffer 0 ── copy ──► device
         ── read ──► buffer 1 ── copy ──►

The copies run on the stream of the thread that loads; what comes after them there finds them done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cortex.models import host_memory
from cortex.models.sources import Source

Copy = Callable[[Tensor, Tensor], Callable[[], None]]
"""Begins to copy the second tensor into the first; what it returns waits until that is done."""

Fill = Callable[[memoryview], None]
"""Reads into all of a place."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read at once: *sources*, one after the other, as bytes.

    They stay as they are in *into*, uint8 and contiguous, or *land* takes them to where they stay,
    before it returns. First *check* looks at them.
    """

    sources: tuple[Source, ...]
    into: Tensor | None = None
    land: Callable[[Tensor], None] | None = None
    landed_bytes: int = 0  # of the weights that *land* makes of them
    check: Callable[[memoryview], None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(source.nbytes for source in self.sources)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights that are there then."""
        return self.landed_bytes if self.into is None else self.nbytes


class Lane(Protocol):
    """The way of one reader's pieces from their files to their places."""

    def carry(self, piece: Piece, fill: Fill) -> None:
        """Have *fill* read *piece*, and see that it reaches its place."""


class HostLane:
    """To places in the host's memory, by one buffer where need be."""

    def __init__(self, buffer_bytes: int) -> None:
        self._buffer = host_memory.empty(buffer_bytes, torch.device("cpu"))

    def carry(self, piece: Piece, fill: Fill) -> None:
        """Read it there, or into the buffer."""
        place = self._buffer[: piece.nbytes] if piece.into is None else piece.into
        fill(_bytes(place))
        if piece.land:
            piece.land(place)


class Staging:
    """To places on a device, by two or more buffers, uint8 of one size, that take turns."""

    def __init__(self, device: torch.device, buffers: Sequence[Tensor], copy: Copy) -> None:
        self._device = device
        self._buffers = buffers
        self._copy = copy
        self._waits: list[Callable[[], None]] = [_nothing] * len(buffers)
        self._turn = 0

    def carry(self, piece: Piece, fill: Fill) -> None:
        """Read it into the buffer whose turn it is, and begin to copy it."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        self._waits[turn]()
        buffer = self._buffers[turn][: piece.nbytes]
        fill(_bytes(buffer))
        place = piece.into
        if place is None:
            place = torch.empty(piece.nbytes, dtype=torch.uint8, device=self._device)
        self._waits[turn] = self._copy(place.view(-1), buffer)
        if piece.land:
            piece.land(place)


def lane_for(device: torch.device, buffer_bytes: int) -> Lane:
    """Return a reader's way to *device*, for pieces of up to *buffer_bytes* that change."""
    if device.type != "cuda":
        return HostLane(buffer_bytes)
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    return Staging(device, buffers, _copy_to_gpu)


def stream_of(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Return what has a thread use the stream that this thread uses now."""
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).numpy().data.cast("B")


def _copy_to_gpu(place: Tensor, buffer: Tensor) -> Callable[[], None]:
    place.copy_(buffer, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
    done.record()
    return done.synchronize


def _nothing() -> None:
    """Wait for no copy."""
