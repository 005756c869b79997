"""Weights on their way to a GPU: read into pinned memory, and copied while the next piece is read.

    file ── read ──► buffer 0 ── copy ──► device       one is filled
         ── read ──► buffer 1 ── copy ──►              while the other is copied

Pinned memory, which nobody else can have, is two pieces, however large the weights are. The copies
run on the stream of the thread that loads; what comes after them there finds them done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Copy = Callable[[Tensor, Tensor], Callable[[], None]]
"""Begins to copy the second tensor into the first; what it returns waits until that is done."""


PIECE_BYTES = 1 << 23


class Staging:
    """Two or more buffers, uint8 of one size, that take turns."""

    def __init__(self, buffers: Sequence[Tensor], copy: Copy) -> None:
        self._buffers = buffers
        self._copy = copy
        self._waits: list[Callable[[], None]] = [_nothing] * len(buffers)
        self._turn = 0

    def pieces(self, into: Tensor) -> Iterator[memoryview]:
        """Give out places to fill, in order; each is copied into *into* when the next is asked for.

        *into* is uint8 and contiguous.
        """
        flat = into.view(-1)
        for place in torch.split(flat, self._buffers[0].numel()):
            turn = self._turn
            self._turn = (turn + 1) % len(self._buffers)
            self._waits[turn]()
            buffer = self._buffers[turn][: place.numel()]
            yield buffer.numpy().data.cast("B")
            self._waits[turn] = self._copy(place, buffer)


def staging_for(device: torch.device) -> Staging | None:
    """Return one for the GPU *device*; None where weights are read to the place they stay."""
    if device.type != "cuda":
        return None
    buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    return Staging(buffers, _copy_to_gpu)


def _copy_to_gpu(place: Tensor, buffer: Tensor) -> Callable[[], None]:
    place.copy_(buffer, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
    done.record()
    return done.synchronize


def _nothing() -> None:
    """Wait for no copy."""
