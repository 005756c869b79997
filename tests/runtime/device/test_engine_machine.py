"""Whatever comes in whatever order, and whatever fails, every sequence ends once and frees all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from structlog.testing import capture_logs

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Failed, ReasoningBudget, SamplingParams
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.refusal import Refused
from cortex.runtime.device.sequence_states import RecurrentStates
from engine_fakes import UNHEALTHY_TOKEN, answer, vector
from engine_run import Run

FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "min_p": 0.05, "top_logprobs": 3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {3: 2.0}},
    {"reasoning_budget": ReasoningBudget(3, (), (11, 12)), "top_logprobs": 0},
    {"prompt_logprobs": 1},
]
tokens = st.integers(0, UNHEALTHY_TOKEN - 1)
prompts = st.builds(
    list.__add__,
    st.lists(tokens, max_size=70),
    st.lists(tokens | st.just(UNHEALTHY_TOKEN), min_size=1, max_size=1),
)


class EngineMachine(RuleBasedStateMachine):
    """Sequences and embeddings of one engine; ``asked`` are those that it took."""

    sequences = Bundle("sequences")

    @initialize(
        blocks=st.integers(2, 12),
        seats=st.integers(1, 4),
        budget=st.integers(1, 24),
        context=st.integers(20, 100),
        runs_ahead=st.booleans(),
        snapshots=st.none() | st.integers(0, 3),
        options=st.builds(EngineOptions, prefix_cache=st.booleans(), speculation=st.booleans()),
    )
    def begin(self, runs_ahead: bool, **bounds: Any) -> None:
        self.runs_ahead = runs_ahead
        self.run = Run(runs_ahead=runs_ahead, **bounds)
        self.asked: dict[int, tuple[list[int], SamplingParams | Pooling]] = {}
        self.cancelled: Counter[int] = Counter()
        self.numbers = 0

    @rule(
        target=sequences,
        prompt=prompts,
        features=st.sampled_from(FEATURES),
        max_tokens=st.integers(0, 30),
    )
    def generate(self, prompt: list[int], features: dict[str, Any], max_tokens: int) -> int:
        sampling = SamplingParams(
            **{"temperature": 0.0, "max_tokens": max_tokens, "seed": self.numbers, **features}
        )
        return self._take(prompt, sampling)

    @rule(target=sequences, prompt=prompts, pooling=st.sampled_from(["last", "mean"]))
    def embed(self, prompt: list[int], pooling: Pooling) -> int:
        return self._take(prompt, pooling)

    @rule(number=sequences)
    def cancel(self, number: int) -> None:
        is_here = number in self.run.engine

        words = self.run.engine.cancel(number)

        assert len(words) == is_here
        self._note_cancelled([number] * len(words), words)

    @rule()
    def cancel_all(self) -> None:
        alive = self.run.engine._scheduler.sequence_ids

        words = self.run.engine.cancel_all()

        assert len(words) == len(alive)
        self._note_cancelled(alive, words)

    @precondition(lambda self: self.run.engine.has_work)
    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        with capture_logs():  # what fails in a step may come out in the next
            for _ in range(steps):
                if self.run.engine.has_work:
                    self.run.step()

    @precondition(lambda self: self.run.engine.has_work)
    @rule(
        error=st.sampled_from(
            [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ValueError("a bug")]
        )
    )
    def step_that_fails(self, error: Exception) -> None:
        failed_before = len(self.run.failures)
        self.run.model.module.errors = [error]

        with capture_logs():  # else a traceback is drawn with all that is in its frames, slowly
            self.run.step()

        assert len(self.run.failures) > failed_before or self.runs_ahead

    @invariant()
    def every_block_is_free_or_of_those_that_run(self) -> None:
        pool, scheduler = self.run.engine.pool, self.run.engine._scheduler
        taken = {block for sequence in scheduler.running for block in sequence.blocks}
        assert pool.free + len(taken) == pool.total
        assert all(not sequence.blocks for sequence in scheduler.waiting)
        states = scheduler._states
        if isinstance(states, RecurrentStates):
            assert states.pool.free + len(scheduler.running) == states.pool.total

    @invariant()
    def sums_are_kept_of_embeddings_that_run_and_of_no_others(self) -> None:
        assert set(self.run.engine._pooler._sums) <= set(self.run.engine._scheduler.sequence_ids)

    @invariant()
    def what_has_not_ended_is_there_and_what_has_is_gone(self) -> None:
        for number in self.asked:
            assert self._ends(number) + (number in self.run.engine) == 1

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        with capture_logs():
            self.run.until_idle()
        assert all(self._ends(number) == 1 for number in self.asked)
        assert self.run.has_all_blocks
        assert not len(self.run.engine._pooler)
        for number, (prompt, asked) in self.asked.items():
            self._check_what_it_said(number, prompt, asked)

    def _take(self, prompt: list[int], asked: SamplingParams | Pooling) -> int:
        self.numbers += 1
        try:
            if isinstance(asked, SamplingParams):
                self.run.start(self.numbers, prompt, asked)
            else:
                self.run.embed(self.numbers, prompt, asked)
        except Refused:
            assert self.numbers not in self.run.engine
        else:
            self.asked[self.numbers] = (prompt, asked)
        return self.numbers

    def _note_cancelled(self, numbers: list[int], words: list[Any]) -> None:
        for number, word in zip(numbers, words, strict=True):
            is_embedding = not isinstance(self.asked[number][1], SamplingParams)
            assert isinstance(word, Failed) == is_embedding
            self.cancelled[number] += 1

    def _ends(self, number: int) -> int:
        failed = [f for f in self.run.failures if number in {f.sequence_id, f.command_id}]
        return (
            len(failed)
            + self.cancelled[number]
            + (number in self.run.finishes)
            + (number in self.run.vectors)
        )

    def _check_what_it_said(
        self, number: int, prompt: list[int], asked: SamplingParams | Pooling
    ) -> None:
        if not isinstance(asked, SamplingParams):
            if number in self.run.vectors:
                expected = pytest.approx(vector(prompt, asked), rel=1e-6)
                assert self.run.vectors[number] == expected
            return
        is_whole = number in self.run.finishes and not self.cancelled[number]
        if asked.prompt_logprobs is not None and is_whole:
            assert [token for token, _ in self.run.scores[number]] == prompt[1:]
        if asked == SamplingParams(0.0, asked.max_tokens, asked.seed):
            said = self.run.tokens[number]
            assert prompt[-1] == UNHEALTHY_TOKEN or said == answer(prompt, len(said))


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
