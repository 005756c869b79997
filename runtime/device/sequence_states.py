"""Where the recurrent states of a model's sequences lie, when they are copied, and what is kept.

A state is what a recurrent layer knows of all tokens before, and a step changes it in place: it can
be continued, but not gone back in, and not applied to twice. So a head that others have computed
can only be continued from a *snapshot*, a copy taken when the state was just there:

    tokens      0 ........ 2048 ........ 4096 ... special | ... end of the prompt | answer ...
    snapshots                |             |            |          |                |
                        every 2,048 tokens, of the answer too      rounded down to a block

A snapshot is large, so they are that few. The end of the prompt serves whoever sends it again. The
next turn of a conversation often begins to differ before it: what the template wrote after the last
special token (``<|im_start|>``, then a thinking block, say) is written otherwise, or merged with
what follows, once an answer stands behind it; the text up to there is safe, since no merge
crosses a special token. Every 2,048 tokens serve prompts with a common head, and a sequence that
has to be computed again.

Copies are part of the plan (``StepPlan.restores``, ``.snapshots``) and done in its order, hence a
slot may be given to somebody else as soon as its copy is planned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.sequence import Sequence
from cortex.runtime.device.state_pool import StatePool

SNAPSHOT_TOKENS = 2048
"""A snapshot at least every so many tokens; a multiple of every block size."""


class Copies(NamedTuple):
    """Pairs of slots, from the first to the second: before a step, and after it."""

    restores: list[tuple[int, int]]
    snapshots: list[tuple[int, int]]


class SequenceStates:
    """What the scheduler asks of states; of a model without recurrent layers: there are none."""

    can_step_again = True
    """Whether a step that failed half-way can be tried again as if it had not begun."""

    def add(self, sequence: Sequence) -> None:
        """Decide where the snapshots of *sequence* will be taken."""

    def head(self, keys: list[bytes], blocks: BlockPool) -> list[bytes]:
        """Return the first of *keys*, as far as what is known of them can be continued."""
        del blocks
        return keys

    def join(self, sequence: Sequence, head: list[bytes]) -> None:
        """Give *sequence*, which begins after *head*, the state from there."""

    def release(self, sequence: Sequence) -> None:
        """Take back what *sequence* was given, if anything."""

    def chunk(self, sequence: Sequence, count: int) -> int:
        """Return how many of its next *count* tokens a step may compute up to a snapshot."""
        del sequence
        return count

    def has_to_know(self, sequence: Sequence) -> bool:
        """Whether a snapshot of the next step is named by a token that is due."""
        del sequence
        return False

    def copies(self, planned: Iterable[tuple[Sequence, int]]) -> Copies:
        """Return what to copy around a step of so many tokens of each of *planned*."""
        del planned
        return Copies([], [])

    def advance(self, sequence: Sequence) -> None:
        """Note that the step was launched: the snapshot of *sequence*, if any, can be found."""

    def give_up(self) -> None:
        """Note that the step was not launched: there are no snapshots of it."""

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let no further prompt find the snapshots that are known by *keys*."""

    def clear(self) -> None:
        """Forget all snapshots."""


class RecurrentStates(SequenceStates):
    """The slots of one model's states; ``Sequence.state_slot`` says which is whose.

    *special_ids* are tokens that no merge crosses. No snapshots are taken where prefixes are not
    kept, of embeddings, and of prompts whose log probabilities are asked for.
    """

    can_step_again = False

    def __init__(
        self,
        pool: StatePool,
        block_tokens: int,
        *,
        special_ids: frozenset[int] = frozenset(),
        keeps_prefixes: bool = True,
        interval_tokens: int = SNAPSHOT_TOKENS,
    ) -> None:
        self.pool = pool
        self._block_tokens = block_tokens
        self._special_ids = special_ids
        self._keeps_prefixes = keeps_prefixes
        self._interval_tokens = interval_tokens
        self._restores: list[tuple[int, int]] = []
        self._taken: dict[int, tuple[int, bytes]] = {}  # slot and key of snapshots, by sequence

    def add(self, sequence: Sequence) -> None:
        """Note the end of the prompt and its last special token, rounded down to blocks."""
        is_scored = sequence.sampling.prompt_logprobs is not None
        sequence.has_snapshots = self._keeps_prefixes and sequence.pooling is None and not is_scored
        if sequence.has_snapshots:
            ends = (len(sequence.tokens) - 1, self._after_last_special(sequence.tokens))
            sequence.snapshot_ends = [
                end // self._block_tokens * self._block_tokens for end in ends
            ]

    def head(self, keys: list[bytes], blocks: BlockPool) -> list[bytes]:
        """Return the *keys* up to the last one that a block and a snapshot are known by."""
        count = blocks.known(keys)
        while count and keys[count - 1] not in self.pool:
            count -= 1
        return keys[:count]

    def join(self, sequence: Sequence, head: list[bytes]) -> None:
        """Give *sequence* a slot, and plan to copy the snapshot after *head* into it."""
        source = self.pool.use(head[-1]) if head else None
        slot = self.pool.take()
        assert slot is not None, "there are more slots than seats"
        sequence.state_slot = slot
        if source is not None and source != slot:
            self._restores.append((source, slot))

    def release(self, sequence: Sequence) -> None:
        """Take the slot of *sequence* back, if it has one."""
        if sequence.state_slot is None:
            return
        self.pool.give_back(sequence.state_slot)
        sequence.state_slot = None

    def chunk(self, sequence: Sequence, count: int) -> int:
        """Return how many of its next *count* tokens a step may compute up to a snapshot."""
        return min(count, self._next_end(sequence, count) - sequence.computed)

    def has_to_know(self, sequence: Sequence) -> bool:
        """Whether a snapshot of the next step is named by a token that is due."""
        end = sequence.computed + sequence.remaining
        return sequence.is_due and self._next_end(sequence, sequence.remaining + 1) == end

    def copies(self, planned: Iterable[tuple[Sequence, int]]) -> Copies:
        """Return the snapshots that were joined from, and those to take."""
        restores, self._restores = self._restores, []
        snapshots = []
        for sequence, count in planned:
            if self._next_end(sequence, count + 1) == sequence.computed + count:
                snapshots += self._snapshot(sequence, sequence.computed + count)
        return Copies(restores, snapshots)

    def advance(self, sequence: Sequence) -> None:
        """Let others find the snapshot that was taken of *sequence*, if any."""
        if sequence.id in self._taken:
            self.pool.keep(*self._taken.pop(sequence.id))

    def give_up(self) -> None:
        """Give the slots back that were taken for snapshots."""
        for slot, _ in self._taken.values():
            self.pool.give_back(slot)
        self._taken.clear()

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let no further prompt find the snapshots that are known by *keys*."""
        self.pool.forget(keys)

    def clear(self) -> None:
        """Forget all snapshots."""
        self.pool.clear()

    def _after_last_special(self, tokens: list[int]) -> int:
        """Return the position after the last special token, 0 where there is none."""
        for at in range(len(tokens) - 1, 0, -1):
            if tokens[at - 1] in self._special_ids:
                return at
        return 0

    def _next_end(self, sequence: Sequence, count: int) -> int:
        """Return the next position a snapshot is taken at, or one *count* tokens ahead."""
        far = sequence.computed + count
        if not sequence.has_snapshots:
            return far
        periodic = sequence.computed - sequence.computed % self._interval_tokens
        ends = (*sequence.snapshot_ends, periodic + self._interval_tokens)
        return min([far, *(end for end in ends if end > sequence.computed)])

    def _snapshot(self, sequence: Sequence, end: int) -> list[tuple[int, int]]:
        """Return the copy of a snapshot of the state after *end* tokens, if it is a new one."""
        key = sequence.keys(end // self._block_tokens, self._block_tokens)[-1]
        assert sequence.state_slot is not None, "it runs"
        if self.pool.use(key) is not None or (slot := self.pool.take()) is None:
            return []
        self._taken[sequence.id] = slot, key
        return [(sequence.state_slot, slot)]
