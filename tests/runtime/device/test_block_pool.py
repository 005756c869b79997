"""A block has at most one owner, and free plus used is all there is."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cortex.runtime.device.block_pool import BlockPool


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


class PoolMachine(RuleBasedStateMachine):
    """Any interleaving of taking and giving back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(13, 4)
        self.owners: list[list[int]] = []

    @rule(count=st.integers(1, 8))
    def take(self, count: int) -> None:
        free = self.pool.free
        blocks = self.pool.take(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        owner = data.draw(st.integers(0, len(self.owners) - 1))
        self.pool.give_back(self.owners.pop(owner))

    @invariant()
    def no_block_has_two_owners_and_none_is_lost(self) -> None:
        owned = [block for blocks in self.owners for block in blocks]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(self.pool.total))
        assert self.pool.free + len(owned) == self.pool.total


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
