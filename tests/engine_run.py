"""An engine on a fake model, run to its end; it notes what each sequence said and how it ended."""

from __future__ import annotations

import math
from array import array

import torch

from cortex.ipc.messages import Embed, Embedded, Failed, Generate, SamplingParams
from cortex.ipc.ring import Flag, TokenRecord
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import ModelRunner
from engine_fakes import FakeModel, greedy

Top = tuple[int, float]


class Run:
    """``tokens``, ``logprobs`` and ``tops`` are by sequence, and in step with each other."""

    def __init__(
        self, *, blocks: int = 64, seats: int = 8, budget: int = 512, context: int = 2048
    ) -> None:
        self.model = FakeModel()
        self.engine = Engine(
            "m",
            ModelRunner(self.model, self.model.new_cache(blocks, 16), torch.device("cpu")),
            Limits(context, seats, blocks, 0),
            token_budget=budget,
        )
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.tops: dict[int, list[list[Top]]] = {}
        self.finishes: dict[int, Flag] = {}
        self.vectors: dict[int, list[float]] = {}
        self.failures: list[Failed] = []
        self._top: list[TokenRecord] = []

    def start(
        self, sequence_id: int, prompt: list[int], sampling: SamplingParams | None = None
    ) -> None:
        self.engine.start(Generate(0, sequence_id, "m", prompt, sampling or greedy(8)))
        self.tokens[sequence_id] = []
        self.logprobs[sequence_id] = []
        self.tops[sequence_id] = []

    def embed(self, command_id: int, prompt: list[int], pooling: Pooling = "mean") -> None:
        self.engine.start(Embed(command_id, "m", prompt, pooling))

    def step(self) -> None:
        report = self.engine.step()
        for record in report.records:
            self._note(record)
        assert not self._top, "the likeliest come right before their token"
        for event in report.events:
            if isinstance(event, Embedded):
                self.vectors[event.command_id] = array("f", event.vector).tolist()
            else:
                self.failures.append(event)

    def until_idle(self) -> None:
        for _ in range(20_000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it never came to an end")

    @property
    def codes(self) -> dict[int | None, str]:
        """The codes of what failed, by sequence, or by the command of an embedding."""
        assert all((f.sequence_id is None) != (f.command_id is None) for f in self.failures)
        return {f.sequence_id or f.command_id: f.code for f in self.failures}

    @property
    def has_all_blocks(self) -> bool:
        return self.engine.pool.free == self.engine.pool.total

    def _note(self, record: TokenRecord) -> None:
        if record.flags & Flag.TOP:
            self._top.append(record)
            assert record.spare == len(self._top)
            return
        assert all(top.sequence_id == record.sequence_id for top in self._top)
        assert record.spare == 0
        number = record.sequence_id
        self.tokens[number].append(record.token_id)
        self.logprobs[number].append(record.logprob)
        self.tops[number].append([(top.token_id, top.logprob) for top in self._top])
        self._top = []
        if record.flags & Flag.FINISH:
            self.finishes[number] = Flag(record.flags) & Flag.FINISH


def is_same(some: list[float], others: list[float]) -> bool:
    """Whether two lists of log probabilities are equal, bit for bit, those not asked for too."""
    return [None if math.isnan(x) else x for x in some] == [
        None if math.isnan(x) else x for x in others
    ]
