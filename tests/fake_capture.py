"""CUDA graphs without CUDA: what was captured is computed again, into the same place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class FakeGraph:
    """A captured step; like a real one it always writes its logits to where they were."""

    compute: Callable[[], Tensor]
    logits: Tensor
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.logits.copy_(self.compute())


@dataclass
class FakeCapture:
    """Captures whatever it is given, but for the sizes in ``fails_at``."""

    fails_at: set[int] = field(default_factory=set)
    graphs: dict[int, FakeGraph] = field(default_factory=dict)
    """By rows, in order of capture."""

    def __call__(self, compute: Callable[[], Tensor]) -> FakeGraph:
        logits = compute().clone()
        if len(logits) in self.fails_at:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        graph = self.graphs[len(logits)] = FakeGraph(compute, logits)
        return graph

    @property
    def bytes(self) -> int:
        return sum(graph.logits.nbytes for graph in self.graphs.values())
