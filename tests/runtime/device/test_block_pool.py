"""Free plus used is all there is, and a block is shared only by those who begin the same."""

from collections import Counter
from itertools import accumulate, takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cortex.runtime.device.block_pool import BlockPool, block_key


def test_a_partly_filled_block_counts_as_one() -> None:
    pool = BlockPool(4, 16)

    assert [pool.blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_taking_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(4, 16)

    assert pool.take(5) is None
    assert pool.free == 4


def test_giving_back_a_block_that_nobody_owns_is_a_bug() -> None:
    pool = BlockPool(4, 16)

    with pytest.raises(AssertionError, match="no owner"):
        pool.give_back([0])


Head = tuple[int, ...]
"""The blocks of a prompt up to one of them, each named by the token that fills it."""


def key_of(head: Head) -> bytes:
    *_, key = accumulate(head, lambda key, token: block_key(key, [token] * 4), initial=b"")
    return key


class PoolMachine(RuleBasedStateMachine):
    """Any interleaving of prompts that come, grow, end and are forgotten, beside a plain model.

    ``known`` and ``cached`` are what the pool should know, and hold for nobody, the block that
    goes first at the front; ``written`` is what the memory of each block would hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, 4)
        self.owners: list[list[int]] = []
        self.known: dict[Head, int] = {}
        self.cached: list[int] = []
        self.written: dict[int, Head] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple))
    def prompt(self, tokens: Head) -> None:
        heads = [tokens[:end] for end in range(1, len(tokens) + 1)]
        shared = self.pool.share(map(key_of, heads))
        assert shared == [self.known[head] for head in takewhile(self.known.__contains__, heads)]
        self.cached = [block for block in self.cached if block not in shared]
        self.owners.append(shared)
        if self._grow(shared, len(heads) - len(shared)):
            for block, head in zip(shared, heads, strict=True):
                self._write(block, head)
        else:
            self._end(-1)

    @precondition(lambda self: self.owners)
    @rule(count=st.integers(1, 4), data=st.data())
    def answer(self, count: int, data: st.DataObject) -> None:
        owner = data.draw(st.integers(0, len(self.owners) - 1))
        self._grow(self.owners[owner], count)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self._end(data.draw(st.integers(0, len(self.owners) - 1)))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        head = data.draw(st.sampled_from(sorted(self.known)))
        self.pool.forget([key_of(head), b"of nobody"])
        block = self.known.pop(head)
        self.cached = [cached for cached in self.cached if cached != block]

    @rule()
    def clear(self) -> None:
        assert self.pool.clear() == len(self.known)
        self.known, self.cached = {}, []

    @invariant()
    def no_block_is_lost_or_owned_by_strangers(self) -> None:
        owners = Counter(block for blocks in self.owners for block in blocks)
        assert set(owners) <= set(range(self.pool.total))
        assert self.pool.free + len(owners) == self.pool.total
        for block, count in owners.items():
            assert count == self.pool._owners[block]
            assert count == 1 or block in self.written

    @invariant()
    def what_is_known_is_what_was_written(self) -> None:
        assert self.pool._block_of == {key_of(head): block for head, block in self.known.items()}
        assert all(self.written[block] == head for head, block in self.known.items())

    @invariant()
    def what_was_used_last_goes_last(self) -> None:
        assert list(self.pool._cached) == self.cached
        assert self.pool.cached == len(self.cached)

    def _grow(self, blocks: list[int], count: int) -> bool:
        free = self.pool.free
        more = self.pool.take(count)
        assert (more is None) == (count > free)
        if more is None:
            return False
        evicted = self.cached[: max(0, count - (free - len(self.cached)))]
        assert set(evicted) <= set(more), "the least recently used, and only where none is free"
        assert not set(self.cached[len(evicted) :]) & set(more)
        self.cached = self.cached[len(evicted) :]
        self.known = {head: block for head, block in self.known.items() if block not in more}
        for block in more:
            self.written.pop(block, None)
        blocks += more
        return True

    def _write(self, block: int, head: Head) -> None:
        assert self.written.setdefault(block, head) == head
        self.pool.remember(block, key_of(head))
        if block not in self.known.values():
            self.known.setdefault(head, block)

    def _end(self, owner: int) -> None:
        blocks = self.owners.pop(owner)
        self.pool.give_back(blocks)
        still = {block for others in self.owners for block in others}
        known = set(self.known.values())
        self.cached += [b for b in reversed(blocks) if b in known and b not in still]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
