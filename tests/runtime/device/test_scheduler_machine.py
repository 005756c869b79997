"""Whatever comes in whatever order: streams go on, order holds, the cache is what it says, all end.

The steps that are planned are run by a plain memory: each token is written where the plan's block
table says, and what a sequence is about to be continued from has to be all there, in its place.
Of a model with recurrent states each slot holds the tokens that were applied to it, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cortex.ipc.messages import SamplingParams
from cortex.ipc.ring import Flag
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.block_pool import BlockPool, block_key
from cortex.runtime.device.drafts import Costs
from cortex.runtime.device.scheduler import SCORED_ROWS, Scheduler
from cortex.runtime.device.sequence import NO_ANSWER, UNKNOWN, Sequence
from cortex.runtime.device.sequence_states import RecurrentStates
from cortex.runtime.device.state_pool import StatePool
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan

BLOCK_TOKENS = 4
CONTEXT_TOKENS = 150
CHEAP = Costs(0.0, 0.05)
BROKEN = [-1]
"""What a state is after a step that failed half-way."""
MOST_STEPS = 1_000
"""Of a sequence, those included that it waits for one other."""


def next_token(tokens: list[int]) -> int:
    """Return what follows *tokens*: round and round, with a surprise now and then."""
    return tokens[0] if len(tokens) % 9 == 0 else (tokens[-1] + 1) % 3


def continued(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


@dataclass
class Asked:
    """A sequence, what it was asked with, and whether its logits are finite."""

    sequence: Sequence
    prompt: list[int]
    is_healthy: bool
    scored: list[int] = field(default_factory=list)


class SchedulerMachine(RuleBasedStateMachine):
    """Generations and embeddings of one scheduler; its steps tell their tokens at once or late."""

    @initialize(
        blocks=st.integers(3, 40),
        seats=st.integers(1, 4),
        budget=st.integers(1, 24),
        runs_ahead=st.booleans(),
        keeps_prefixes=st.booleans(),
        drafts=st.booleans(),
        snapshots=st.none() | st.integers(0, 4),
        interval_blocks=st.integers(1, 6),
    )
    def begin(
        self,
        *,
        blocks: int,
        seats: int,
        budget: int,
        runs_ahead: bool,
        keeps_prefixes: bool,
        drafts: bool,
        snapshots: int | None,
        interval_blocks: int,
    ) -> None:
        self.states: RecurrentStates | None = None
        if snapshots is not None:
            self.states = RecurrentStates(
                StatePool(seats + snapshots),
                BLOCK_TOKENS,
                special_ids=frozenset({1}),
                keeps_prefixes=keeps_prefixes,
                interval_tokens=interval_blocks * BLOCK_TOKENS,
            )
        self.scheduler = Scheduler(
            BlockPool(blocks, BLOCK_TOKENS),
            max_sequences=seats,
            max_context_tokens=CONTEXT_TOKENS,
            token_budget=budget,
            keeps_prefixes=keeps_prefixes,
            draft_costs=CHEAP if drafts else None,
            states=self.states,
        )
        self.runs_ahead = runs_ahead
        self.memory: dict[tuple[int, int], int] = {}
        self.contents: dict[bytes, list[int]] = {}  # of a block that is known by a key
        self.slots: dict[int, list[int]] = {}  # the tokens that each state has seen
        self.heads: dict[bytes, list[int]] = {}  # the tokens up to the end of a known block
        self.flight: StepPlan | None = None
        self.open: dict[int, Asked] = {}
        self.numbers = 0

    @rule(
        parts=st.lists(st.integers(0, 1), min_size=1, max_size=17),
        cut=st.integers(0, BLOCK_TOKENS - 1),
        max_tokens=st.integers(0, 20) | st.just(CONTEXT_TOKENS),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        is_healthy=st.integers(0, 9).map(bool),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def generate(
        self,
        *,
        parts: list[int],
        cut: int,
        max_tokens: int,
        priority: int,
        is_healthy: bool,
        prompt_logprobs: int | None,
    ) -> None:
        prompt = [part for part in parts for _ in range(BLOCK_TOKENS)][cut:]
        prompt = prompt[: self.scheduler.limit_tokens - 1]
        sampling = SamplingParams(0.0, max_tokens, 0, prompt_logprobs=prompt_logprobs)
        self._add(Sequence(self.numbers, list(prompt), sampling, priority=priority), is_healthy)

    @rule(tokens=st.integers(1, 60), pooling=st.sampled_from(["last", "mean"]))
    def embed(self, tokens: int, pooling: Pooling) -> None:
        prompt = [1] * min(tokens, self.scheduler.limit_tokens)
        self._add(Sequence(self.numbers, prompt, NO_ANSWER, pooling), is_healthy=True)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        assert self.scheduler.end(number) is self.open.pop(number).sequence

    @rule()
    def clear(self) -> None:
        self.scheduler.clear_prefixes()
        assert not self.scheduler.pool.cached
        assert self.states is None or not self.states.pool.snapshots

    @precondition(lambda self: self.open)
    @rule()
    def step_that_fails(self) -> None:
        if self.scheduler.has_to_know:
            self._land()
        plan = self._planned()
        for slot in [target for _, target in (*plan.restores, *plan.snapshots)]:
            self.slots[slot] = BROKEN
        for planned in plan.sequences:
            self.slots[planned.state_slot] = BROKEN
        self.scheduler.give_up()
        self._land()

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 8))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            if self.open:
                self._step()

    @invariant()
    def no_block_is_lost(self) -> None:
        scheduler = getattr(self, "scheduler", None)
        if scheduler is None:
            return
        owned = [block for sequence in scheduler.running for block in sequence.blocks]
        assert scheduler.pool.free + len(set(owned)) == scheduler.pool.total
        assert not any(sequence.blocks for sequence in scheduler.waiting)
        assert len(scheduler.running) <= scheduler.max_sequences

    @invariant()
    def no_slot_is_lost(self) -> None:
        states = getattr(self, "states", None)
        if states is None:
            return
        owned = [sequence.state_slot for sequence in self.scheduler.running]
        assert states.pool.free + len(set(owned)) == states.pool.total
        assert len(set(owned)) == len(owned)
        assert all(sequence.state_slot is None for sequence in self.scheduler.waiting)

    @invariant()
    def a_snapshot_has_seen_what_its_key_says(self) -> None:
        states = getattr(self, "states", None)
        for key, slot in states.pool._slot_of.items() if states else []:
            assert self.slots[slot] == self.heads[key]

    @invariant()
    def a_known_block_holds_what_its_key_says(self) -> None:
        known = self.scheduler.pool._block_of if hasattr(self, "scheduler") else {}
        for key, block in known.items():
            held = [self.memory[block, at] for at in range(BLOCK_TOKENS)]
            assert held == self.contents[key]

    @invariant()
    def of_equals_those_who_came_first_run_first(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        waiting = self.scheduler.waiting
        for sequence in self.scheduler.running:
            equals = [other for other in waiting if other.priority == sequence.priority]
            assert all(sequence.arrival < other.arrival for other in equals)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(MOST_STEPS * self.numbers):
            if not self.open:
                break
            self._step()
        assert not self.open, "every sequence ends"
        assert self.scheduler.pool.free == self.scheduler.pool.total

    def _add(self, sequence: Sequence, is_healthy: bool) -> None:
        self.scheduler.add(sequence)
        self.open[self.numbers] = Asked(sequence, list(sequence.tokens), is_healthy)
        self.numbers += 1

    def _step(self) -> None:
        if self.scheduler.has_to_know:
            self._land()
        plan = self._planned()
        self._write(plan)
        self.scheduler.advance(plan)
        self._land()
        self.flight = plan
        if not self.runs_ahead:
            self._land()
        for planned in plan.embeddings.sequences:
            if planned.is_last:
                self.scheduler.end(planned.sequence_id)
                del self.open[planned.sequence_id]

    def _planned(self) -> StepPlan:
        scheduler = self.scheduler
        before = list(scheduler.running)
        streams = {s.id for s in before if s.remaining == 1 and scheduler._goes_on(s)}
        plan = scheduler.schedule()

        preempted = [sequence for sequence in before if sequence not in scheduler.running]
        stayed = [sequence for sequence in before if sequence in scheduler.running]
        joined = [sequence for sequence in scheduler.running if sequence not in before]
        planned = {p.sequence_id for p in plan.sequences}
        assert plan.tokens <= scheduler.token_budget
        assert sum(len(p.scored) for p in plan.sequences) <= SCORED_ROWS
        assert all(p.token_ids for p in plan.sequences)
        assert streams - {s.id for s in preempted} <= planned, "a stream goes on in every step"
        assert all(s.rank < p.rank for s in stayed for p in preempted), "the last goes back"
        assert all(s.rank < w.rank for s in joined for w in scheduler.waiting), "the first joins"
        assert planned or all(s.is_due for s in scheduler.running), "only what is due is waited for"
        for sequence in joined:
            assert sequence.computed < len(sequence.tokens), "the last token is always computed"
            assert sequence.cached_tokens is None or sequence.cached_tokens < sequence.prompt_tokens
        return plan

    def _write(self, plan: StepPlan) -> None:
        """Do what the device does: put each token of *plan* where it belongs."""
        for planned in plan.generations.sequences:
            self._note_contents(self.open[planned.sequence_id].sequence.tokens)
        self._copy(plan.restores)
        for planned in plan.sequences if self.states else []:
            seen = self.slots[planned.state_slot] if planned.first_position else []
            text = self._text_of(planned)
            assert seen == text[: planned.first_position], "its state is the one to continue"
            self.slots[planned.state_slot] = text
        self._copy(plan.snapshots)
        for planned in plan.sequences:
            text = self._text_of(planned)
            for at, token in enumerate(text[planned.first_position :], planned.first_position):
                self.memory[self._place(planned, at)] = token
        for planned in plan.sequences:
            held = [self.memory.get(self._place(planned, at)) for at in range(planned.end_position)]
            assert held == self._text_of(planned), "what it is continued from is all there"

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        targets = [target for _, target in pairs]
        assert len(set(targets)) == len(targets)
        self.slots |= {target: self.slots[source] for source, target in pairs}

    def _note_contents(self, tokens: list[int]) -> None:
        key = b""
        for at in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = block_key(key, tokens[at : at + BLOCK_TOKENS])
            self.contents[key] = tokens[at : at + BLOCK_TOKENS]
            self.heads[key] = tokens[: at + BLOCK_TOKENS]

    def _text_of(self, planned: PlannedSequence) -> list[int]:
        """Return all tokens up to the end of what is planned; check the plan's own."""
        tokens = list(self.open[planned.sequence_id].sequence.tokens)
        if planned.token_ids[-1] == UNKNOWN:
            assert self.flight is not None, "it is told by the step before"
            assert planned.sequence_id in {p.sequence_id for p in self.flight.sampled}
            tokens.append(next_token(tokens))
        known = tokens[planned.first_position : planned.known_position]
        assert [*known, *planned.drafted] == [
            token if token != UNKNOWN else tokens[-1] for token in planned.token_ids
        ]
        return [*tokens[: planned.known_position], *planned.drafted]

    @staticmethod
    def _place(planned: PlannedSequence, position: int) -> tuple[int, int]:
        return planned.block_table[position // BLOCK_TOKENS], position % BLOCK_TOKENS

    def _land(self) -> None:
        flight, self.flight = self.flight, None
        for planned in flight.sampled if flight else []:
            asked = self.open.get(planned.sequence_id)
            if asked is None:
                continue
            if asked.is_healthy:
                self._tell(planned, asked)
            else:
                self._fail(asked)

    def _tell(self, planned: PlannedSequence, asked: Asked) -> None:
        sequence = asked.sequence
        asked.scored += planned.scored
        if not planned.samples:
            return
        is_scored = sequence.sampling.prompt_logprobs is not None
        assert asked.scored == (asked.prompt[1:] if is_scored else []), "each token, once"
        if not sequence.sampling.max_tokens:
            assert sequence.tokens == asked.prompt
            self.scheduler.end(sequence.id)
            del self.open[sequence.id]
            return
        for draft in [*planned.drafted, None]:
            token = next_token(sequence.tokens)
            flags = self.scheduler.append(sequence.id, token, is_computed=token == draft)
            if flags & Flag.FINISH:
                assert sequence.id not in self.scheduler
                said = len(sequence.tokens) - len(asked.prompt)
                assert sequence.tokens == continued(asked.prompt, said)
                assert said == sequence.sampling.max_tokens or len(sequence.tokens) == min(
                    CONTEXT_TOKENS, self.scheduler.pool.tokens
                )
                del self.open[sequence.id]
                return
            if token != draft:
                return

    def _fail(self, asked: Asked) -> None:
        # A scored prompt may fail before its end.
        computed = asked.sequence.computed // BLOCK_TOKENS
        self.scheduler.end(asked.sequence.id, is_healthy=False)
        del self.open[asked.sequence.id]
        keys = set(asked.sequence.keys(computed, BLOCK_TOKENS))
        assert not keys & set(self.scheduler.pool._block_of), "nobody finds what it computed"
        assert self.states is None or not any(key in self.states.pool for key in keys)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
