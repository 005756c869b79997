"""The steps of a group are made in order, by the models that they are for, once those are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cortex.ipc.plan_ring import PlanRing, PlanWriter
from cortex.runtime.device import membership
from cortex.runtime.device.follower import Follower
from cortex.runtime.device.membership import Membership
from cortex.runtime.device.plan_wire import ToldStep, encode_step
from cortex.runtime.device.refusal import DeviceLost, PeerLost
from cortex.runtime.device.rendezvous import Place


class Noting(Follower):
    """Notes the steps that it is told."""

    def __init__(self, model: str, journal: list[str]) -> None:
        self.model = model
        self._journal = journal

    def step(self, told: ToldStep, next_message: object) -> None:
        self._journal.append(f"{self.model} {next_message() if told.has_masks else ''}".strip())  # type: ignore[operator] # it is one


class Bench:
    """A follower's membership, and the first rank's end of its ring."""

    def __init__(self, meeting: Path) -> None:
        ring = PlanRing(1)
        self.writer = PlanWriter(ring.descriptors(0))
        place = Place("g", 1, 2, meeting=meeting, device=torch.device("cpu"))
        self.membership = Membership(place, ring.descriptors(1))
        self.journal: list[str] = []

    def tell(self, model: str, *, masks: bytes | None = None) -> None:
        told = ToldStep(model, "launch", [], [], [], masks is not None, [])
        self.writer.broadcast(encode_step(told))
        if masks is not None:
            self.writer.broadcast(masks)

    def add(self, model: str) -> None:
        self.membership.add(Noting(model, self.journal))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.membership.close()


def test_steps_are_made_one_at_a_time_and_in_order(bench: Bench) -> None:
    bench.add("a")
    bench.add("b")
    for model in "abba":
        bench.tell(model)

    made = [bench.membership.follow(()) for _ in range(5)]

    assert made == [True] * 4 + [False]
    assert bench.journal == ["a", "b", "b", "a"]


def test_a_step_of_a_model_that_is_being_loaded_waits_and_what_is_behind_it(bench: Bench) -> None:
    bench.add("a")
    bench.tell("late")
    bench.tell("a")

    assert not bench.membership.follow({"late"})
    assert bench.membership.fds == [], "what has come already wakes nobody up again"
    bench.add("late")
    while bench.membership.follow(()):
        pass

    assert bench.journal == ["late", "a"]
    assert len(bench.membership.fds) == 1


def test_a_step_of_a_model_that_is_nowhere_is_the_end(bench: Bench) -> None:
    bench.tell("x")

    with pytest.raises(DeviceLost, match="a step of x, which is not here"):
        bench.membership.follow(())


def test_a_model_that_goes_makes_its_last_steps_first(bench: Bench) -> None:
    bench.add("a")
    bench.tell("a")
    bench.tell("a")

    assert bench.membership.remove("a", ())

    assert bench.journal == ["a", "a"]
    bench.tell("a")
    with pytest.raises(DeviceLost):
        bench.membership.follow(())


def test_a_model_that_goes_waits_for_one_that_comes_where_its_steps_are_behind(
    bench: Bench,
) -> None:
    bench.add("a")
    for model in ("late", "a"):
        bench.tell(model)

    assert not bench.membership.remove("a", {"late"})
    bench.add("late")
    assert bench.membership.remove("a", ())

    assert bench.journal == ["late", "a"]


def test_a_model_that_goes_does_not_wait_for_the_end_of_another(bench: Bench) -> None:
    class Endless(Noting):
        """Its first rank tells the next step as soon as this one is made."""

        def step(self, told: ToldStep, next_message: object) -> None:
            super().step(told, next_message)
            assert len(self._journal) < 1000, "the others are followed for ever"
            bench.tell("other")

    bench.membership.add(Endless("other", bench.journal))
    bench.add("a")
    bench.tell("other")
    bench.tell("a")

    assert bench.membership.remove("a", ())

    assert "a" in bench.journal


def test_masks_are_the_next_message(bench: Bench) -> None:
    bench.add("a")
    bench.tell("a", masks=b"m")
    bench.tell("a")

    while bench.membership.follow(()):
        pass

    assert bench.journal == ["a b'm'", "a"]


def test_masks_that_do_not_come_are_a_lost_peer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "RING_WAITS_SECONDS", 0.0)
    bench.add("a")
    bench.writer.broadcast(encode_step(ToldStep("a", "launch", [], [], [], True, [])))

    with pytest.raises(PeerLost, match="what its grammars allow"):
        bench.membership.follow(())


def test_the_first_rank_follows_nobody(tmp_path: Path) -> None:
    ring = PlanRing(1)
    place = Place("g", 0, 2, meeting=tmp_path, device=torch.device("cpu"))
    first = Membership(place, ring.descriptors(0))

    assert not first.follow(())
    assert first.fds == []
    first.broadcast(b"x")
    first.close()
