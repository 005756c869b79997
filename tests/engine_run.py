"""An engine on a fake model, run to its end; it notes what each sequence said and how it ended."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Embed, Embedded, Failed, Generate, SamplingParams
from cortex.ipc.ring import Flag, TokenRecord
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.engine import DEFAULT_OPTIONS, Engine
from cortex.runtime.device.grammar import Grammars
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import Launched, ModelRunner, Runner
from cortex.runtime.device.row import Chosen, Row
from cortex.runtime.device.sequence import UNKNOWN
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from engine_fakes import UNHEALTHY_TOKEN, FakeModel, RecallingModule, greedy, recurrent_model

Top = tuple[int, float]


class LateRunner:
    """A runner whose steps are computed when their results are asked for, in order, or not at all.

    An UNKNOWN token is taken from the step before, as a GPU would: it has to be computed by then.
    """

    runs_ahead = True

    def __init__(self, runner: ModelRunner) -> None:
        self.vocab_size = runner.vocab_size
        self.launches: list[_Late] = []
        self._runner = runner
        self._has_states = bool(runner._cache.states)

    def launch(self, plan: StepPlan, rows: Sequence[Row]) -> Launched:
        before = self.launches[-1] if self.launches else None
        self.launches.append(_Late(self._runner, plan, rows, before))
        return self.launches[-1]

    def hidden(self, plan: StepPlan) -> Tensor:
        for late in self.launches[-2:] if self._has_states else []:
            late.compute()  # what this one changes comes after what they read
        return self._runner.hidden(plan)


class _Late:
    def __init__(
        self, runner: ModelRunner, plan: StepPlan, rows: Sequence[Row], before: _Late | None
    ) -> None:
        self._runner = runner
        self._plan = plan
        self._rows = rows
        self._before = before
        self._chosen: list[Chosen] | None = None
        self._error: Exception | None = None

    def result(self) -> list[Chosen]:
        self.compute()
        if self._error:
            raise self._error
        assert self._chosen is not None, "it has come to an end"
        return self._chosen

    def compute(self) -> None:
        if self._chosen is not None or self._error is not None:
            return
        try:
            sequences = [self._with_known(planned) for planned in self._plan.sequences]
            self._before = None
            plan = msgspec.structs.replace(self._plan, sequences=sequences)
            self._chosen = self._runner.launch(plan, self._rows).result()
        except Exception as exc:  # noqa: BLE001 - it is told with the result
            self._error = exc

    def last_token(self, sequence_id: int) -> int:
        """Return what a sequence was given in this step, or anything where it failed."""
        self.compute()
        if self._chosen is None:
            return 0
        chosen = iter(self._chosen)
        last = {p.sequence_id: [next(chosen) for _ in range(p.rows)] for p in self._plan.sampled}
        return last[sequence_id][-1].token_id or 0

    def _with_known(self, planned: PlannedSequence) -> PlannedSequence:
        if planned.token_ids[-1] != UNKNOWN:
            return planned
        assert self._before is not None, "an unknown token comes from the step before"
        token = self._before.last_token(planned.sequence_id)
        return msgspec.structs.replace(planned, token_ids=[*planned.token_ids[:-1], token])


class Run:
    """``tokens``, ``logprobs`` and ``tops`` are by sequence, and in step with each other."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        seats: int = 8,
        budget: int = 512,
        context: int = 2048,
        variety: int = UNHEALTHY_TOKEN,
        snapshots: int | None = None,
        special_ids: frozenset[int] = frozenset(),
        runs_ahead: bool = False,
        options: EngineOptions = DEFAULT_OPTIONS,
        grammars: Grammars | None = None,
        wrapped: Callable[[Runner], Runner] = lambda runner: runner,
    ) -> None:
        """The model has recurrent states where there are *snapshots*, beside one for each seat.

        The engine's runner is *wrapped*.
        """
        slots = 0 if snapshots is None else seats + snapshots
        self.model = recurrent_model(variety) if slots else FakeModel(RecallingModule(variety))
        self.cache = self.model.new_cache(blocks, 16, slots)
        runner = ModelRunner(self.model, self.cache, torch.device("cpu"))
        self.engine = Engine(
            "m",
            wrapped(LateRunner(runner) if runs_ahead else runner),
            Limits(context, seats, blocks, 0, state_slots=slots),
            token_budget=budget,
            options=options,
            grammars=grammars,
            special_ids=special_ids,
        )
        self.steps = self.drafted = self.accepted = 0
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.tops: dict[int, list[list[Top]]] = {}
        self.finishes: dict[int, Flag] = {}
        self.vectors: dict[int, list[float]] = {}
        self.failures: list[Failed] = []
        self.cached: dict[int, int] = {}
        """Of each sequence that said something, the tokens of its prompt that were found."""
        self.scores: dict[int, list[Top]] = {}
        """Of prompts: each token but the first, and its log probability."""
        self.score_tops: dict[int, list[list[Top]]] = {}
        self._top: list[TokenRecord] = []

    def start(
        self, sequence_id: int, prompt: list[int], sampling: SamplingParams | None = None
    ) -> None:
        self.engine.start(Generate(0, sequence_id, "m", prompt, sampling or greedy(8)))
        self.tokens[sequence_id] = []
        self.logprobs[sequence_id] = []
        self.tops[sequence_id] = []
        self.scores[sequence_id] = []
        self.score_tops[sequence_id] = []

    def embed(self, command_id: int, prompt: list[int], pooling: Pooling = "mean") -> None:
        self.engine.start(Embed(command_id, "m", prompt, pooling))

    def step(self) -> None:
        report = self.engine.step()
        self.steps += 1
        self.drafted += report.drafted
        self.accepted += report.accepted
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
        if record.flags & Flag.PROMPT:
            assert not self.tokens[record.sequence_id], "it comes before the first token"
            assert record.sequence_id not in self.cached, "it comes once"
            self.cached[record.sequence_id] = record.token_id
            return
        if record.flags & Flag.TOP:
            self._top.append(record)
            assert record.spare == len(self._top)
            return
        assert all(top.sequence_id == record.sequence_id for top in self._top)
        assert record.spare == 0
        number = record.sequence_id
        tops = [(top.token_id, top.logprob) for top in self._top]
        if record.flags & Flag.SCORE:
            assert number not in self.cached, "it comes before the answer"
            self.scores[number].append((record.token_id, record.logprob))
            self.score_tops[number].append(tops)
        if record.flags & Flag.TOKEN:
            self.tokens[number].append(record.token_id)
            self.logprobs[number].append(record.logprob)
            self.tops[number].append(tops)
        self._top = []
        if record.flags & Flag.FINISH:
            self.finishes[number] = Flag(record.flags) & Flag.FINISH


def is_same(some: list[float], others: list[float]) -> bool:
    """Whether two lists of log probabilities are equal, bit for bit, those not asked for too."""
    return [None if math.isnan(x) else x for x in some] == [
        None if math.isnan(x) else x for x in others
    ]
