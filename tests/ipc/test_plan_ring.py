"""What the first rank writes, every other rank reads once, in order; a full ring makes it wait."""

import multiprocessing
import select
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from cortex.ipc.plan_ring import HEAD, SLOT_BYTES, PlanReader, PlanRing, PlanRingFull, PlanWriter
from plan_ring_child import read

ROOM = SLOT_BYTES - HEAD.size


def ends(ring: PlanRing) -> tuple[PlanWriter, list[PlanReader]]:
    ranks = range(1, len(ring.filled) + 1)
    return PlanWriter(ring.descriptors(0)), [PlanReader(ring.descriptors(r)) for r in ranks]


def test_every_reader_gets_every_message_once_and_in_order() -> None:
    writer, readers = ends(PlanRing(3))

    for message in (b"a", b"", b"ccc"):
        writer.broadcast(message)

    for reader in readers:
        assert [reader.take() for _ in range(4)] == [b"a", b"", b"ccc", None]


def test_readers_in_other_processes_see_all_bytes_of_messages_of_any_length() -> None:
    ring = PlanRing(2, slots=4)
    lengths = [1, ROOM - 1, ROOM, ROOM + 1, 9 * ROOM, 0, 17] * 6
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(2)]
    children = [
        spawn.Process(target=read, args=(ring.descriptors(rank), len(lengths), pipes[rank - 1][1]))
        for rank in (1, 2)
    ]
    for child in children:
        child.start()
    writer = PlanWriter(ring.descriptors(0))

    for number, length in enumerate(lengths):
        writer.broadcast(bytes([number % 7]) * length, timeout_seconds=20.0)

    wanted = [(length, number % 7 * length) for number, length in enumerate(lengths)]
    assert [[answers.recv() for _ in lengths] for answers, _ in pipes] == [wanted, wanted]
    for child in children:
        child.join(20.0)


def test_a_full_ring_makes_the_writer_wait_for_its_slowest_reader_and_give_up_in_words() -> None:
    writer, (quick, slow) = ends(PlanRing(2, slots=2))
    for message in (b"a", b"b"):
        writer.broadcast(message, timeout_seconds=0.0)
        assert quick.take() == message

    with pytest.raises(PlanRingFull, match="rank 2 takes no plans"):
        writer.broadcast(b"c", timeout_seconds=0.0)

    assert slow.take() == b"a"
    writer.broadcast(b"c", timeout_seconds=0.0)
    assert quick.take() == b"c"
    assert [slow.take(), slow.take()] == [b"b", b"c"]


def test_a_writer_that_waits_goes_on_when_the_reader_does() -> None:
    writer, (reader,) = ends(PlanRing(1, slots=1))

    def write() -> None:
        for length in range(50):
            writer.broadcast(b"x" * length)

    writing = threading.Thread(target=write)
    writing.start()

    lengths = [len(reader.take(20.0) or b"") for _ in range(50)]

    writing.join(20.0)
    assert lengths == list(range(50))


def test_the_part_of_a_message_that_has_come_waits_for_the_rest() -> None:
    writer, (reader,) = ends(PlanRing(1, slots=2))

    with pytest.raises(PlanRingFull):
        writer.broadcast(b"x" * (2 * ROOM + 5), timeout_seconds=0.0)

    assert reader.take() is None
    writer.broadcast(b"rest")  # as the writer would have gone on
    assert reader.take() == b"x" * 2 * ROOM + b"rest"


def test_a_reader_is_woken_only_by_something_new() -> None:
    writer, (reader,) = ends(PlanRing(1))
    assert not select.select([reader], [], [], 0.0)[0]

    writer.broadcast(b"a")

    assert select.select([reader], [], [], 20.0)[0]
    reader.take()
    assert not select.select([reader], [], [], 0.0)[0]


def test_a_ring_and_its_ends_leave_no_descriptor_behind() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    ring = PlanRing(2)
    writer, (first, second) = ends(ring)

    for end in (writer, first, second, ring):
        end.close()

    assert set(Path("/proc/self/fd").iterdir()) == before


class PlanRingMachine(RuleBasedStateMachine):
    """Any interleaving of writing and reading keeps order, count and contents."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = PlanRing(2, slots=3)
        self.writer, self.readers = ends(self.ring)
        self.written: list[bytes] = []
        self.read = [0, 0]

    @rule(size=st.sampled_from([0, 1, ROOM, ROOM + 1]))
    def write(self, size: int) -> None:
        slots = max(1, -(-size // ROOM))
        used = sum(max(1, -(-len(m) // ROOM)) for m in self.written[min(self.read) :])
        if used + slots > 3:
            return
        message = bytes([len(self.written) % 251]) * size
        self.writer.broadcast(message, timeout_seconds=0.0)
        self.written.append(message)

    @rule(reader=st.integers(0, 1))
    def take(self, reader: int) -> None:
        at = self.read[reader]
        expected = self.written[at] if at < len(self.written) else None
        assert self.readers[reader].take() == expected
        self.read[reader] += expected is not None

    def teardown(self) -> None:
        self.ring.close()


TestPlanRingMachine = PlanRingMachine.TestCase
TestPlanRingMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
