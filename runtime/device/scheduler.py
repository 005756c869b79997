"""Which tokens of which sequences the next step computes. Pure Python: no torch, no clock, no I/O.

There is no prefill phase and no decode phase. A sequence has tokens known and tokens computed, and
a step brings some of the difference closer, under one budget of tokens:

1. every running sequence that lacks one token gets it (streams never stall);
2. running prompts get what is left, in order, in chunks;
3. waiting sequences join while budget, seats and blocks last, strictly in order (before 1, where
   they are more urgent than one that runs);
4. where nobody has a prompt to compute, sequences bring drafts of their next tokens along.

The order is that of priority, then of arrival. A sequence that joins finds the blocks of its head
that others have computed, and takes the rest of the tokens known plus a little, not of
``max_tokens``. When blocks run out later, the last in order is preempted: it gives its blocks back,
keeps its tokens, and is computed again, mostly from the blocks that are still known. So is one that
runs while a more urgent one waits. Whoever runs comes before whoever waits, the first of them can
always go on, and every sequence ends.

A plan may be made before the step before has told its tokens: each of them is then ``UNKNOWN`` in
the plan, and its sequence, unless that token is its last for sure, goes on.

An embedding is a sequence that is given no token: it ends when all of its tokens are computed.

A prompt whose log probabilities are asked for finds no blocks of others, and its chunks are short:
each of its tokens wants a row of logits, and memory for those is bounded (``SCORED_ROWS``).

Of a model with recurrent states a head can be continued only where a snapshot was taken, so chunks
end there and blocks beyond are not shared (``sequence_states.py``).
"""

from __future__ import annotations

from bisect import insort
from itertools import count as numbers
from typing import TYPE_CHECKING

from cortex.ipc.ring import Flag
from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.drafts import Costs, Drafter
from cortex.runtime.device.sequence import Sequence
from cortex.runtime.device.sequence_states import SequenceStates
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan

if TYPE_CHECKING:  # this file needs no torch
    from cortex.runtime.device.grammar import GrammarState

TOKEN_BUDGETS = {"cpu": 128, "cuda": 512}
"""Tokens of a step, by kind of device. On a CPU a step of 128 prompt tokens takes a quarter of the
time of 512, so streams stall for less, and as many tokens a second (SmolLM2-135M, 2 cores)."""
SCORED_ROWS = 32
"""Rows of logits of prompts in a step, for which memory is set aside."""
RESERVE_TOKENS = 64
"""The little that joining takes beyond the tokens known."""


class Scheduler:
    """The sequences of one model; the only owner of their state and of the pool's blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_context_tokens: int,
        token_budget: int,
        keeps_prefixes: bool = True,
        draft_costs: Costs | None = None,
        states: SequenceStates | None = None,
    ) -> None:
        """Draft where *draft_costs* are given, one of ``drafts.COSTS``.

        Not with recurrent *states*, though: of a draft that was wrong they cannot be rid.
        """
        self.pool = pool
        self.max_sequences = max_sequences
        self.limit_tokens = min(max_context_tokens, pool.tokens)
        self.token_budget = max(token_budget, max_sequences)  # so that all running can decode
        self.running: list[Sequence] = []  # in order
        self.waiting: list[Sequence] = []  # in order, all after those running
        self.preemptions = 0
        self._keeps_prefixes = keeps_prefixes
        self._draft_costs = draft_costs or Costs(0.0, 0.0)
        self._drafts = draft_costs is not None and states is None
        self._states = states or SequenceStates()
        self._arrivals = numbers()
        self._by_id: dict[int, Sequence] = {}

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def sequence_ids(self) -> list[int]:
        """All sequences, in order."""
        return [sequence.id for sequence in (*self.running, *self.waiting)]

    @property
    def has_to_know(self) -> bool:
        """Whether the next plan needs the tokens that the step before is about to tell."""
        price = self._draft_costs.price(len(self.running))
        return any(
            sequence.is_due
            and (
                self._states.has_to_know(sequence)
                or not sequence.is_free_of_history
                or (sequence.drafter is not None and sequence.drafter.is_hopeful(price))
            )
            for sequence in self.running
        )

    def add(self, sequence: Sequence) -> None:
        """Queue *sequence*, whose prompt fits ``limit_tokens``, a generation's with one more."""
        assert sequence.id not in self._by_id, "ids are the caller's and unique"
        most = self.limit_tokens - (sequence.pooling is None)  # a generation needs one more
        assert 0 < len(sequence.tokens) <= most, "the engine refused it before"
        sequence.arrival = next(self._arrivals)
        if self._drafts and sequence.pooling is None and sequence.sampling.max_tokens:
            sequence.drafter = Drafter()
        self._states.add(sequence)
        self._by_id[sequence.id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def end(self, sequence_id: int, *, is_healthy: bool = True) -> Sequence | None:
        """Forget a sequence wherever it is, free its blocks and return it; None if none is it.

        No other prompt finds the head of one that is not healthy: who has computed what of it, and
        where it went wrong, is not known.
        """
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return None
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if not is_healthy:
            self.pool.forget(sequence.known_keys)
            self._states.forget(sequence.known_keys)
        self._release(sequence)
        return sequence

    def schedule(self) -> StepPlan:
        """Decide the next step.

        It is empty only where every sequence waits for the step before to tell its last token.
        """
        has_preempted = self._make_room()
        if not has_preempted:
            self._admit_urgent()
        ready = [sequence for sequence in self.running if self._goes_on(sequence)]
        counts = {sequence.id: 1 for sequence in ready if sequence.remaining == 1}
        budget, rows = self.token_budget - len(counts), SCORED_ROWS

        def give(sequence: Sequence) -> None:
            nonlocal budget, rows
            count = self._states.chunk(sequence, min(sequence.within(rows), budget))
            counts[sequence.id] = count
            budget -= count
            rows -= len(sequence.scored_by(count))

        for sequence in ready:
            if sequence.remaining > 1 and budget:
                give(sequence)
        while budget and not has_preempted and (joined := self._admit()):
            give(joined)
        planned = [sequence for sequence in self.running if counts.get(sequence.id)]
        if not planned:
            return StepPlan([])
        copies = self._states.copies([(sequence, counts[sequence.id]) for sequence in planned])
        if any(counts[sequence.id] > 1 for sequence in planned):
            plans = [_plan(sequence, counts[sequence.id], []) for sequence in planned]
        else:
            plans = [_plan(s, 1, drafts) for s, drafts in self._with_drafts(planned, budget)]
        return StepPlan(plans, *copies)

    def advance(self, plan: StepPlan) -> None:
        """Note that *plan* was launched: what comes after it finds its tokens computed."""
        for planned in plan.sequences:
            sequence = self._by_id[planned.sequence_id]
            sequence.scored += len(planned.scored)
            sequence.computed = planned.known_position
            sequence.due += planned.samples
            self._remember(sequence)
            self._states.advance(sequence)

    def give_up(self) -> None:
        """Note that the step just planned was not launched, whatever it has done.

        What it wrote into blocks is written again. Not so what it did to states: those who run
        begin again.
        """
        self._states.give_up()
        while self.running and not self._states.can_step_again:
            self._preempt_last()

    def clear_prefixes(self) -> int:
        """Forget what could be used again, and return how many blocks of it there were."""
        self._states.clear()
        return self.pool.clear()

    def append(self, sequence_id: int, token_id: int, *, is_computed: bool = False) -> Flag:
        """Give a sequence its next token; one that is finished by it is forgotten here.

        *is_computed* says that the token was drafted in the step that told it.
        """
        sequence = self._by_id[sequence_id]
        flags = sequence.append(token_id, self.limit_tokens)
        sequence.computed += is_computed
        sequence.due -= not is_computed  # the others of a step come before its last
        if flags & Flag.FINISH:
            self.end(sequence_id)
        return flags

    def grammar_of(self, sequence_id: int) -> GrammarState | None:
        """Return where the answer of a sequence stands in its grammar; None without one."""
        return self._by_id[sequence_id].grammar

    def is_complete(self, sequence_id: int) -> bool:
        """Whether the grammar of a sequence lets nothing follow."""
        return self._by_id[sequence_id].is_complete

    def cached_tokens_once(self, sequence_id: int) -> int | None:
        """Return how many tokens of a prompt were found computed; None when asked again."""
        sequence = self._by_id[sequence_id]
        cached_tokens, sequence.cached_tokens = sequence.cached_tokens, None
        return cached_tokens

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether there is something to compute, whatever token is due."""
        last = sequence.last_possible(self.limit_tokens)
        return not sequence.is_due or len(sequence.tokens) + 1 < last

    def _make_room(self) -> bool:
        """Give every running sequence blocks for its tokens; return whether one had to go back."""
        preempted = False
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            tokens = sequence.computed + sequence.remaining if self._goes_on(sequence) else 0
            missing = self.pool.blocks_for(tokens) - len(sequence.blocks)
            blocks = self.pool.take(missing) if missing > 0 else []
            if blocks is None:
                self._preempt_last()
                preempted = True
            else:
                sequence.blocks += blocks
                at += 1
        return preempted

    def _admit_urgent(self) -> None:
        """Let those join who come before one that runs, whose prompt would hold them up."""
        while self.waiting and self.running and self.waiting[0].rank < self.running[-1].rank:
            if self._admit() is None:
                return

    def _admit(self) -> Sequence | None:
        """Let the first of the waiting join, or return None where it has to wait."""
        if not self.waiting or self.waiting[0].is_due:
            return None
        first = self.waiting[0]
        if not self._can_join(first):
            if not self._could_join_for_others(first):
                return None
            while not self._can_join(first):
                self._preempt_last()
        self.waiting.remove(first)
        insort(self.running, first, key=_rank)
        return first

    def _can_join(self, sequence: Sequence) -> bool:
        """Give *sequence* the blocks that joining takes, where there are seat and blocks."""
        if len(self.running) >= self.max_sequences:
            return False
        head = self._states.head(self._head_keys(sequence), self.pool)
        shared = self.pool.share(head)
        others = self.pool.take(self._price(sequence) - len(shared))
        if others is None:
            self.pool.give_back(shared)
            return False
        sequence.blocks = shared + others
        sequence.known_blocks = len(shared)
        sequence.computed = len(shared) * self.pool.block_tokens
        self._states.join(sequence, head)
        if not sequence.has_joined:
            sequence.has_joined = True
            sequence.cached_tokens = sequence.computed
        return True

    def _could_join_for_others(self, sequence: Sequence) -> bool:
        """Whether *sequence* could join if those that are less urgent went back."""
        less_urgent = [other for other in self.running if other.rank > sequence.rank]
        freed = {block for other in less_urgent for block in other.blocks}
        kept = {b for other in self.running if other.rank < sequence.rank for b in other.blocks}
        return (
            bool(less_urgent)
            and len(self.running) - len(less_urgent) < self.max_sequences
            and self.pool.free + len(freed - kept) >= self._price(sequence)
        )

    def _head_keys(self, sequence: Sequence) -> list[bytes]:
        """Return the keys of the blocks that may be shared: all full ones but the last token's."""
        if not self._keeps_prefixes or sequence.pooling is not None or sequence.unscored:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_tokens
        return sequence.keys(full, self.pool.block_tokens)

    def _remember(self, sequence: Sequence) -> None:
        """Let others find the blocks of *sequence* that are full by now."""
        if not self._keeps_prefixes or sequence.pooling is not None:
            return
        known = min(sequence.computed, len(sequence.tokens)) // self.pool.block_tokens
        if known == sequence.known_blocks:
            return
        keys = sequence.keys(known, self.pool.block_tokens)
        for index in range(sequence.known_blocks, known):
            self.pool.remember(sequence.blocks[index], keys[index])
        sequence.known_blocks = known

    def _price(self, sequence: Sequence) -> int:
        """Return the blocks that joining takes; never more than the pool has."""
        soon = len(sequence.tokens) + RESERVE_TOKENS
        return self.pool.blocks_for(min(soon, sequence.last_possible(self.limit_tokens)))

    def _with_drafts(
        self, planned: list[Sequence], budget: int
    ) -> list[tuple[Sequence, list[int]]]:
        """Return each of *planned* with its drafts, for which there are budget and free blocks."""
        price = self._draft_costs.price(len(planned))
        with_drafts = []
        for sequence in planned:
            drafts: list[int] = []
            if sequence.drafter and not sequence.is_due and sequence.can_draft:
                left = sequence.last_possible(self.limit_tokens) - len(sequence.tokens) - 1
                drafts = sequence.drafter.draft(price, min(budget, left))
                drafts = drafts[: self._room_for_drafts(sequence, len(drafts))]
            budget -= len(drafts)
            with_drafts.append((sequence, drafts))
        return with_drafts

    def _room_for_drafts(self, sequence: Sequence, count: int) -> int:
        """Return for how many of *count* drafts there are blocks; nobody is preempted for them."""
        missing = self.pool.blocks_for(len(sequence.tokens) + count) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += self.pool.take(missing) or []
        return len(sequence.blocks) * self.pool.block_tokens - len(sequence.tokens)

    def _preempt_last(self) -> None:
        victim = self.running.pop()
        self._release(victim)
        insort(self.waiting, victim, key=_rank)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        self._states.release(sequence)
        sequence.blocks = []
        sequence.computed = sequence.known_blocks = 0


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _plan(sequence: Sequence, count: int, drafts: list[int]) -> PlannedSequence:
    is_last = count == sequence.remaining
    return PlannedSequence(
        sequence_id=sequence.id,
        token_ids=[*sequence.next_tokens(count), *drafts],
        first_position=sequence.computed,
        block_table=list(sequence.blocks),
        is_last=is_last,
        sampling=sequence.sampling,
        pooling=sequence.pooling,
        counts=sequence.counts,
        forced=sequence.forced,
        drafts=len(drafts),
        state_slot=sequence.state_slot or 0,
        scored=sequence.scored_by(count),
    )
