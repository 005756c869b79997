"""The ranks of a tensor-parallel model as threads of one process, which is quick and needs no port.

Each rank runs the same function with a ``Group`` of its own; its collectives wait for each other at
a barrier. The C kernels let several threads in: their buffers belong to a thread, and a second loop
at the same time runs without helpers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from cortex.models.parallel import Group

PATIENCE_SECONDS = 60.0  # a rank that does not come is a failed test, not one that hangs

T = TypeVar("T")


class Meeting:
    """Where the ranks put what they have, and wait until all have."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=PATIENCE_SECONDS)
        self.brought: list[Tensor | None] = [None] * ranks

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """Return what every rank has brought, in their order."""
        self.brought[rank] = x.clone()
        self.barrier.wait()
        all_of_it = [brought for brought in self.brought if brought is not None]
        self.barrier.wait()  # before anybody brings the next
        return all_of_it


class ThreadCollectives:
    """The collectives of one rank; ``calls`` counts them."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.meeting = meeting
        self.calls = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum *x* over the ranks, in their order, so that all get the same bits."""
        self.calls += 1
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        """Put the columns of all ranks side by side."""
        self.calls += 1
        return torch.cat(self.meeting.exchange(self.rank, x), dim=-1)


def on_ranks(ranks: int, run: Callable[[Group], T]) -> list[T]:
    """Call *run* as each of *ranks* ranks; return what they return, or raise what one raised."""
    meeting = Meeting(ranks)

    def as_rank(rank: int) -> T:
        try:
            return run(Group(rank, ranks, ThreadCollectives(rank, meeting)))
        except BaseException:
            meeting.barrier.abort()  # the others would wait for it
            raise

    with ThreadPoolExecutor(ranks) as threads:
        futures = [threads.submit(as_rank, rank) for rank in range(ranks)]
    failures = [error for future in futures if (error := future.exception())]
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
