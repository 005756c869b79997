"""Two device loops that share a model, in one process: who steps, who follows, what goes away."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cortex.ipc.messages import (
    CheckCollective,
    CollectiveChecked,
    Command,
    Event,
    GroupJoined,
    JoinGroup,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    UnloadModel,
)
from cortex.ipc.plan_ring import PlanRing
from cortex.ipc.post import Letters, Post
from cortex.runtime.device.collectives import RankCollectives
from engine_fakes import DeviceBench, FakeLoad, FakeModel, answer, code_of, greedy


class Pair:
    """Two ranks of a group ``g``, driven in turns; the second one follows."""

    def __init__(self, meeting: Path) -> None:
        self.loaded = 0
        self.posts = [Post(), Post()]
        self.letters = [Letters(post.letters) for post in self.posts]
        self.loads = [FakeLoad(m=FakeModel(), n=FakeModel()) for _ in range(2)]
        self.benches = [
            DeviceBench(load, letters=letters)
            for load, letters in zip(self.loads, self.letters, strict=True)
        ]
        ring = PlanRing(1)
        for rank, post in enumerate(self.posts):
            post.send("g", ring.descriptors(rank))
        ring.close()
        joined = self.ask(*(JoinGroup(800, "g", rank, 2, str(meeting)) for rank in range(2)))
        assert all(isinstance(event, GroupJoined) for event in joined), joined

    def ask(self, *commands: Command) -> list[Event]:
        """Ask each rank at the same time; return the answers."""

        def of(bench: DeviceBench, command: Command) -> Event:
            return bench.ask(command)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(of, self.benches, commands))

    def load(self, model: str) -> list[Event]:
        self.loaded += 1
        return self.ask(*[LoadModel(900 + self.loaded, model, f"/{model}", group="g")] * 2)

    def close(self) -> None:
        for bench in self.benches:
            bench.close()
        for letters in self.letters:
            letters.close()
        for post in self.posts:
            post.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def test_ranks_add_up_over_the_loader_threads(pair: Pair) -> None:
    checked = pair.ask(*[CheckCollective(801, "g")] * 2)

    assert checked == [CollectiveChecked(801, "g", 3.0)] * 2


def test_the_follower_makes_the_steps_of_the_first_rank(pair: Pair) -> None:
    first, last = pair.benches
    assert all(isinstance(event, ModelLoaded) for event in pair.load("m"))

    first.generate(1, [1, 2, 3], greedy(8))
    first.run_until_ended(1)
    last.run_until(lambda: pair.loads[1].models["/m"].module.steps >= 8 + 2)

    assert first.tokens(1) == answer([1, 2, 3], 8)
    assert last.records == []


def test_nobody_can_ask_a_follower(pair: Pair) -> None:
    pair.load("m")

    pair.benches[1].generate(1, [1])
    pair.benches[1].run_until_ended(1)

    assert pair.benches[1].failures() == {1: "model_not_loaded"}


def test_a_follower_that_is_unloaded_finishes_what_it_was_told_and_lets_go_of_every_tensor(
    pair: Pair,
) -> None:
    first, last = pair.benches
    pair.load("m")
    module = pair.loads[1].models["/m"].module
    gone, before = weakref.ref(module), module.steps
    first.generate(1, [1], greedy(5))
    first.run_until_ended(1)
    assert isinstance(first.ask(UnloadModel(802, "m")), ModelUnloaded)
    assert module.steps == before, "it has been told, and has made nothing yet"
    pair.loads[1].models.clear()

    last.send(UnloadModel(802, "m"))
    last.turn()

    assert module.steps - before == pair.loads[0].models["/m"].module.steps - before
    assert isinstance(last.channel.events[-1], ModelUnloaded)
    assert last.memory.held == {}
    del module
    gc.collect()
    assert gone() is None


def test_every_rank_of_a_model_that_is_gone_gives_up_its_communicator(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[RankCollectives] = []

    def note(collectives: RankCollectives) -> None:
        closed.append(collectives)

    monkeypatch.setattr(RankCollectives, "close", note)
    pair.load("m")
    pair.load("n")

    for number, bench in enumerate(pair.benches):
        assert isinstance(bench.ask(UnloadModel(802 + number, "m")), ModelUnloaded)

    assert len(set(closed)) == 2


def test_a_rank_that_has_the_model_already_refuses_for_all(pair: Pair) -> None:
    assert isinstance(pair.benches[1].load("m"), ModelLoaded)

    refused = pair.load("m")

    assert [code_of(event) for event in refused] == ["already_loaded"] * 2
    assert all(isinstance(event, ModelLoaded) for event in pair.load("n"))
