"""Slots of recurrent states: the owner of each is known, and so is what a snapshot holds."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cortex.runtime.device.state_pool import StatePool

keys = st.sampled_from([b"a", b"b", b"c", b"d"])


def test_a_slot_is_one_owners_until_it_is_given_back() -> None:
    pool = StatePool(2)
    first, second = pool.take(), pool.take()

    assert {first, second} == {0, 1}
    assert pool.take() is None

    pool.give_back(0)

    assert pool.take() == 0


def test_a_snapshot_is_found_and_stays_where_it_is() -> None:
    pool = StatePool(2)
    pool.keep(_taken(pool), b"a")

    assert b"a" in pool
    assert pool.use(b"a") == pool.use(b"a") is not None
    assert pool.use(b"b") is None


def test_free_slots_are_taken_before_snapshots() -> None:
    pool = StatePool(2)
    pool.keep(_taken(pool), b"a")
    pool.take()

    assert b"a" in pool

    pool.take()

    assert b"a" not in pool


def test_the_snapshot_that_was_not_used_for_longest_is_taken_first() -> None:
    pool = StatePool(2)
    pool.keep(_taken(pool), b"a")
    pool.keep(_taken(pool), b"b")
    pool.use(b"a")
    pool.take()

    assert b"a" in pool
    assert b"b" not in pool


def test_of_two_snapshots_with_one_key_the_first_stays() -> None:
    pool = StatePool(3)
    first, second = _taken(pool), _taken(pool)
    pool.keep(first, b"a")
    pool.keep(second, b"a")

    assert pool.use(b"a") == first
    assert (pool.free, pool.snapshots) == (3, 1)


def test_what_is_forgotten_is_free() -> None:
    pool = StatePool(3)
    pool.keep(_taken(pool), b"a")
    pool.keep(_taken(pool), b"b")
    pool.forget([b"a", b"unknown"])
    assert (pool.free, pool.snapshots) == (3, 1)

    pool.clear()

    assert (pool.free, pool.snapshots) == (3, 0)
    assert sorted([_taken(pool), _taken(pool), _taken(pool)]) == [0, 1, 2]


def _taken(pool: StatePool) -> int:
    slot = pool.take()
    assert slot is not None
    return slot


class PoolMachine(RuleBasedStateMachine):
    """Slots go out and come back as snapshots; ``held`` says what was written into which."""

    @initialize(total=st.integers(0, 5))
    def begin(self, total: int) -> None:
        self.pool = StatePool(total)
        self.taken: set[int] = set()
        self.held: dict[int, bytes] = {}

    @rule()
    def take(self) -> None:
        could = self.pool.free > 0

        slot = self.pool.take()

        assert could == (slot is not None)
        if slot is not None:
            assert slot not in self.taken
            self.taken.add(slot)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        self.taken.remove(slot)
        self.pool.give_back(slot)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), key=keys)
    def keep(self, data: st.DataObject, key: bytes) -> None:
        slot = data.draw(st.sampled_from(sorted(self.taken)))
        self.taken.remove(slot)
        self.held[slot] = key
        self.pool.keep(slot, key)
        assert key in self.pool

    @rule(key=keys)
    def use(self, key: bytes) -> None:
        is_known = key in self.pool

        slot = self.pool.use(key)

        assert is_known == (slot is not None)
        if slot is not None:
            assert slot not in self.taken, "nobody else's"
            assert self.held[slot] == key

    @rule(some=st.lists(keys))
    def forget(self, some: list[bytes]) -> None:
        self.pool.forget(some)
        assert not any(key in self.pool for key in some)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert not self.pool.snapshots

    @invariant()
    def no_slot_is_lost(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.free + len(self.taken) == self.pool.total


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
