"""What the ranks of a group do together while they compute: sums and gathers of activations.

    on GPUs   NCCL, called directly (``nccl.py``)
    on CPUs   gloo, over loopback

A model has a communicator of its own, because a load on one thread may capture graphs with
collectives in them while the main thread steps another model: in one communicator the ranks would
have to agree on the order.

While a model is loaded its collectives are mute: what it is measured with is computed on each rank
alone, at its own pace, and means nothing. Only what a CUDA graph writes down is the real thing.

gloo's own sum of four ranks adds an element in an order that depends on where in the tensor it
lies, so a row's bits would depend on the rows beside it. Here the parts are gathered and added in
the order of the ranks.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined] # torch's

from cortex.models.kernels import ops
from cortex.models.parallel import Collectives
from cortex.runtime.device.nccl import NcclCollectives
from cortex.runtime.device.refusal import PeerLost

GLOO_WAITS_SECONDS = 600.0
"""For a rank that is there and does nothing. Its supervisor sees that much earlier."""


class Communicator(Collectives, Protocol):
    """The collectives of some ranks, and their end."""

    def close(self) -> None:
        """Give up what it holds; nothing uses it any more. Does not wait for the other ranks."""


class GlooCollectives:
    """Over TCP on this host; a rank that goes away is noticed at once."""

    def __init__(self, store: Store, rank: int, ranks: int, meet_seconds: float) -> None:
        """Meet the other ranks in *store*, which is this communicator's alone; raise PeerLost."""
        self._ranks = ranks
        try:
            self._group = _gloo(store, rank, ranks, meet_seconds)
        except RuntimeError as exc:
            raise PeerLost(f"the ranks did not meet: {_first_line(exc)}") from exc
        self._group.set_timeout(timedelta(seconds=GLOO_WAITS_SECONDS))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum contiguous *x* over the ranks, in place, and return it; the same bits on all."""
        parts = self._gathered(x).flatten(2)  # [ranks, M, n]
        total = parts[0]
        for part in parts[1:]:
            total = ops.add(total, part)
        return x.copy_(total.view(x.shape))

    def all_gather(self, x: Tensor) -> Tensor:
        """[M, n] of every rank -> [M, n * ranks], in the order of the ranks."""
        return self._gathered(x).transpose(0, 1).flatten(1)

    def close(self) -> None:
        """Nothing is left to give up once nothing refers to it."""

    def _gathered(self, x: Tensor) -> Tensor:
        """[M, ...] of every rank -> [ranks, M, ...]."""
        parts = x.new_empty(self._ranks * x.size(0), *x.shape[1:])
        try:
            self._group._allgather_base(parts, x).wait()  # noqa: SLF001 - into one tensor, no list
        except RuntimeError as exc:
            raise PeerLost(f"a collective failed: {_first_line(exc)}") from exc
        return parts.view(self._ranks, *x.shape)


class RankCollectives:
    """The collectives of one model on one rank: mute until ``speak``."""

    def __init__(self, communicator: Communicator, ranks: int) -> None:
        self._communicator = communicator
        self._ranks = ranks
        self._is_mute = True

    def speak(self) -> None:
        """Mean it from now on: all ranks have loaded the model."""
        self._is_mute = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum contiguous *x* over the ranks, in place, and return it; the same bits on all."""
        return x if self._keeps_quiet(x) else self._communicator.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """[M, n] of every rank -> [M, n * ranks], in the order of the ranks."""
        if self._keeps_quiet(x):
            return x.repeat(1, self._ranks)
        return self._communicator.all_gather(x)

    def close(self) -> None:
        """Give up the communicator; nothing uses it any more. Does not wait for other ranks."""
        self._communicator.close()

    def _keeps_quiet(self, x: Tensor) -> bool:
        return self._is_mute and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def backend_of(device: torch.device) -> str:
    """Return which library the ranks of *device*'s kind use: nccl or gloo."""
    return "nccl" if device.type == "cuda" else "gloo"


def communicator(
    store: Store, device: torch.device, rank: int, ranks: int, meet_seconds: float
) -> Communicator:
    """Meet the other ranks in *store*, which nothing else uses; raise PeerLost."""
    if device.type != "cuda":
        return GlooCollectives(store, rank, ranks, meet_seconds)
    return NcclCollectives.meeting(store, device, rank, ranks)


def _gloo(store: Store, rank: int, ranks: int, meet_seconds: float) -> Any:
    """Return a process group of one thread, on loopback.

    torch's own choice is whatever address this host's name stands for. For the options it has no
    public name, and no type.
    """
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()  # noqa: SLF001 - see above, also below
    options._devices = [gloo.create_device(hostname="127.0.0.1")]  # noqa: SLF001
    options._timeout = timedelta(seconds=meet_seconds)  # noqa: SLF001
    options._threads = 1  # noqa: SLF001
    return gloo(store, rank, ranks, options)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
