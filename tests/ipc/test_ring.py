"""What goes into the token ring comes out once, in order; a full ring makes the producer wait."""

import multiprocessing
import select
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cortex.ipc.ring import RECORD, RingFull, TokenConsumer, TokenProducer, TokenRing
from ring_child import produce, record


def wait_readable(consumer: TokenConsumer, timeout_seconds: float = 20.0) -> None:
    assert select.select([consumer.fileno()], [], [], timeout_seconds)[0], "nothing came"


def test_a_record_has_the_size_that_the_drawing_says() -> None:
    assert RECORD.size == 24


def test_what_another_process_puts_in_comes_out_once_and_in_order() -> None:
    ring = TokenRing(capacity=64)
    consumer = TokenConsumer(ring)
    steps = [1, 63, 64, 65, 200, 7] * 50
    child = multiprocessing.get_context("spawn").Process(target=produce, args=(ring, steps))
    child.start()

    received: list[int] = []
    while len(received) < sum(steps):
        wait_readable(consumer)
        received += [r.sequence_id for r in consumer.take()]

    child.join(20)
    assert child.exitcode == 0
    assert received == list(range(sum(steps)))
    consumer.close()
    ring.close()


def test_a_full_ring_makes_the_producer_wait_and_then_give_up_in_words() -> None:
    ring = TokenRing(capacity=4)
    producer, consumer = TokenProducer(ring), TokenConsumer(ring)

    with pytest.raises(TimeoutError, match="does not read"):
        producer.publish([record(n) for n in range(5)], timeout_seconds=0.0)

    assert [r.sequence_id for r in consumer.take()] == [0, 1, 2, 3]


def test_a_producer_that_gave_up_goes_on_where_it_was() -> None:
    ring = TokenRing(capacity=4)
    producer, consumer = TokenProducer(ring), TokenConsumer(ring)
    with pytest.raises(RingFull) as full:
        producer.publish([record(n) for n in range(5)], timeout_seconds=0.0)
    assert full.value.published == 4
    consumer.take()

    producer.publish([record(4)], timeout_seconds=0.0)

    assert [r.sequence_id for r in consumer.take()] == [4]


def test_an_empty_ring_gives_nothing() -> None:
    assert TokenConsumer(TokenRing(capacity=4)).take() == []


def test_a_ring_leaves_no_descriptor_behind() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    ring = TokenRing(capacity=4)
    producer, consumer = TokenProducer(ring), TokenConsumer(ring)

    producer.close()
    consumer.close()
    ring.close()

    assert set(Path("/proc/self/fd").iterdir()) == before


class RingMachine(RuleBasedStateMachine):
    """Any interleaving of publishing and taking keeps order and count."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = TokenRing(capacity=7)
        self.producer, self.consumer = TokenProducer(self.ring), TokenConsumer(self.ring)
        self.published = self.taken = 0

    @property
    def room(self) -> int:
        return self.ring.capacity - (self.published - self.taken)

    @precondition(lambda self: self.room)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.room))
        self.producer.publish(
            [record(self.published + n) for n in range(count)], timeout_seconds=0.0
        )
        self.published += count

    @precondition(lambda self: not self.room)
    @rule()
    def publishing_into_a_full_ring_is_refused(self) -> None:
        with pytest.raises(TimeoutError):
            self.producer.publish([record(self.published)], timeout_seconds=0.0)

    @rule()
    def take(self) -> None:
        numbers = [r.sequence_id for r in self.consumer.take()]
        assert numbers == list(range(self.taken, self.published))
        self.taken = self.published

    @invariant()
    def nothing_is_taken_before_it_is_published(self) -> None:
        assert self.taken <= self.published

    def teardown(self) -> None:
        self.producer.close()
        self.consumer.close()
        self.ring.close()


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
