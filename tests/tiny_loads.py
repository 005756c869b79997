"""Parameters without a model around them, filled from hand-made tensors as a load fills them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.safetensors import SafetensorsFile
from cortex.models.filler import Filler, Form, Kept
from cortex.models.kernels import reference
from cortex.models.quantization import Matrix
from cortex.models.sources import Sources
from cortex.models.staging import HostLane, Piece
from cortex.models.tensor_reader import Files, read_pieces

CPU = torch.device("cpu")


class CountedReads:
    """``os.preadv`` that remembers where it read how much."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        count = os.preadv(descriptor, list(views), offset)
        with self._lock:
            self.runs.append((offset, count))
        return count

    @property
    def bytes(self) -> int:
        return sum(count for _, count in self.runs)


def checkpoint_of(
    path: Path, tensors: Mapping[str, Tensor], form: str = "safetensors"
) -> Checkpoint:
    """Write *tensors* to *path* and return the checkpoint that they are."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return Checkpoint(path, form, {}, {}, SafetensorsFile.open(path).tensors)


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    fused: Mapping[str, tuple[str, ...]] | None = None,
    paired: tuple[str, ...] = (),
    form: Form | None = None,
    kept: Kept | None = None,
    preadv: Any = os.preadv,
) -> None:
    """Fill *module* from *checkpoint* on the CPU."""
    sources = Sources(checkpoint, fused=fused or {}, paired=paired, is_tied=False)
    form = form or Form(torch.float32, 2, CPU)
    read(Filler(sources, form, kept or Kept()).fill(module), preadv=preadv)


def read(
    pieces: Sequence[Piece],
    *,
    preadv: Any = os.preadv,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    readers: int = 2,
) -> None:
    """Read *pieces* to the host."""
    size = max((piece.nbytes for piece in pieces), default=0)
    lanes = [HostLane(size) for _ in range(readers)]
    with closing(Files(preadv)) as files:
        read_pieces(pieces, lanes, on_progress, files=files, in_thread=nullcontext)


def values(matrix: Matrix) -> Tensor:
    """Unpack a matrix whose parts are not tiled, [rows, columns] float32."""
    return torch.cat([reference.dequantize(part.kind, part.data) for part in matrix.parts])
