"""Which tokens of which sequences the next step computes. Pure Python: no torch, no clock, no I/O.

There is no prefill phase and no decode phase. A sequence has tokens known and tokens computed, and
a step brings some of the difference closer, under one budget of tokens:

1. every running sequence that lacks one token gets it (streams never stall);
2. running prompts get what is left, in order of arrival, in chunks;
3. waiting sequences join while budget, seats and blocks last, strictly first come, first served.

Joining takes the blocks of the tokens known plus a little, not of ``max_tokens``. When blocks run
out later, the running sequence that came last is preempted: it gives its blocks back, keeps its
tokens, goes to the head of the waiting ones and is computed again. So whoever runs came before
whoever waits, the first of them can always go on, and every sequence ends.

An embedding is a sequence that is given no token: it ends when all of its tokens are computed.

The plan is plain data, so that the ranks of a group can be sent it.
"""

from __future__ import annotations

from collections import deque

import msgspec

from cortex.ipc.messages import SamplingParams
from cortex.ipc.ring import Flag
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.row import is_penalised
from cortex.runtime.device.sequence import Sequence

TOKEN_BUDGETS = {"cpu": 128, "cuda": 512}
"""Tokens of a step, by kind of device. On a CPU a step of 128 prompt tokens takes a quarter of the
time of 512, so streams stall for less, and as many tokens a second (SmolLM2-135M, 2 cores)."""
RESERVE_TOKENS = 64
"""The little that joining takes beyond the tokens known."""


class PlannedSequence(msgspec.Struct, frozen=True):
    """What one sequence brings to a step: tokens at positions from ``first_position`` on."""

    sequence_id: int
    token_ids: list[int]
    first_position: int
    block_table: list[int]
    is_last: bool
    """The last of these tokens is the last known."""
    sampling: SamplingParams
    pooling: Pooling | None = None
    """How an embedding makes one vector of all its tokens; None for a generation."""
    known: list[int] = []
    """All tokens known, ``prompt_tokens`` of them the prompt's, where penalties need them."""
    prompt_tokens: int = 0
    forced: int | None = None
    """The token that comes next whatever the logits say."""

    @property
    def samples(self) -> bool:
        """Whether the logits of the last of these tokens choose the next one."""
        return self.is_last and self.pooling is None

    @property
    def end_position(self) -> int:
        """The position after the last of these tokens: that of a token sampled from them."""
        return self.first_position + len(self.token_ids)


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass, and whose next tokens are sampled from it."""

    sequences: list[PlannedSequence]

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(planned.token_ids) for planned in self.sequences)

    @property
    def generations(self) -> StepPlan:
        """The part of it that may be given tokens."""
        return StepPlan([planned for planned in self.sequences if planned.pooling is None])

    @property
    def embeddings(self) -> StepPlan:
        """The part of it that becomes vectors."""
        return StepPlan([planned for planned in self.sequences if planned.pooling is not None])

    @property
    def sampled(self) -> list[PlannedSequence]:
        """The sequences that get a token, in the order of the rows of logits."""
        return [planned for planned in self.sequences if planned.samples]


class Scheduler:
    """The sequences of one model; the only owner of their state and of the pool's blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_context_tokens: int,
        token_budget: int,
    ) -> None:
        self.pool = pool
        self.max_sequences = max_sequences
        self.limit_tokens = min(max_context_tokens, pool.tokens)
        self.token_budget = max(token_budget, max_sequences)  # so that all running can decode
        self.running: list[Sequence] = []  # in order of arrival
        self.waiting: deque[Sequence] = deque()  # all came later than those running
        self._by_id: dict[int, Sequence] = {}

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def sequence_ids(self) -> list[int]:
        """All sequences, in order of arrival."""
        return [sequence.id for sequence in (*self.running, *self.waiting)]

    def add(self, sequence: Sequence) -> None:
        """Queue *sequence*, whose prompt fits ``limit_tokens``, a generation's with one more."""
        assert sequence.id not in self._by_id, "ids are the caller's and unique"
        most = self.limit_tokens - (sequence.pooling is None)  # a generation needs one more
        assert 0 < len(sequence.tokens) <= most, "the engine refused it before"
        self._by_id[sequence.id] = sequence
        self.waiting.append(sequence)

    def end(self, sequence_id: int) -> Sequence | None:
        """Forget a sequence wherever it is, free its blocks and return it; None if none is it."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return None
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)
        return sequence

    def schedule(self) -> StepPlan:
        """Decide the next step; it is never empty while there is a sequence."""
        preempted = self._make_room()
        counts = {s.id: 1 for s in self.running if s.remaining == 1}
        budget = self.token_budget - len(counts)
        for sequence in self.running:
            if sequence.remaining > 1 and budget:
                counts[sequence.id] = min(sequence.remaining, budget)
                budget -= counts[sequence.id]
        while budget and not preempted and (joined := self._admit()):
            counts[joined.id] = min(joined.remaining, budget)
            budget -= counts[joined.id]
        return StepPlan([_plan(s, counts[s.id]) for s in self.running if s.id in counts])

    def advance(self, plan: StepPlan) -> None:
        """Note that *plan* was computed."""
        for planned in plan.sequences:
            self._by_id[planned.sequence_id].computed = planned.end_position

    def append(self, sequence_id: int, token_id: int) -> Flag:
        """Give a sequence its next token; one that is finished by it is forgotten here."""
        flags = self._by_id[sequence_id].append(token_id, self.limit_tokens)
        if flags & Flag.FINISH:
            self.end(sequence_id)
        return flags

    def _make_room(self) -> bool:
        """Give every running sequence blocks for its tokens; return whether one had to go back."""
        preempted = False
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            missing = self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
            blocks = self.pool.take(missing) if missing > 0 else []
            if blocks is None:
                self._preempt_last()
                preempted = True
            else:
                sequence.blocks += blocks
                at += 1
        return preempted

    def _admit(self) -> Sequence | None:
        """Let the first of the waiting join, or return None where it has to wait."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        blocks = self.pool.take(self._price(self.waiting[0]))
        if blocks is None:
            return None
        sequence = self.waiting.popleft()
        sequence.blocks = blocks
        self.running.append(sequence)
        return sequence

    def _price(self, sequence: Sequence) -> int:
        """Return the blocks that joining takes; never more than the pool has."""
        soon = len(sequence.tokens) + RESERVE_TOKENS
        most = sequence.prompt_tokens + sequence.sampling.max_tokens
        return self.pool.blocks_for(min(soon, most, self.limit_tokens))

    def _preempt_last(self) -> None:
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _plan(sequence: Sequence, count: int) -> PlannedSequence:
    first = sequence.computed
    is_last = count == sequence.remaining
    knows = is_last and is_penalised(sequence.sampling)
    return PlannedSequence(
        sequence_id=sequence.id,
        token_ids=sequence.tokens[first : first + count],
        first_position=first,
        block_table=list(sequence.blocks),
        is_last=is_last,
        sampling=sequence.sampling,
        pooling=sequence.pooling,
        known=list(sequence.tokens) if knows else [],
        prompt_tokens=sequence.prompt_tokens,
        forced=sequence.forced,
    )
