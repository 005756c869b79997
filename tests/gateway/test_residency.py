"""Whose turn it is: no model starves, none that works goes, no memory is promised twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.eviction import Rules, Strategy
from cortex.gateway.fleet import FleetSnapshot, Place
from cortex.gateway.placement import Incoming, Need
from cortex.gateway.residency import Action, Hold, Refuse, Start, turns
from cortex.gateway.room import Claim, accounted_mb
from memory_fleet import NOW, a_fleet, a_node, incoming

DWELL, DURATION, LOAD = 4, 3, 2
SLACK = 6


def one(snapshot: FleetSnapshot, model: Incoming, rules: Rules = Rules()) -> Action:  # noqa: B008  # frozen
    return turns(snapshot, [model], rules)[0]


def test_a_model_that_fits_starts() -> None:
    action = one(a_fleet(a_node("a", [100])), incoming(mb=50))

    assert isinstance(action, Start)
    assert (action.claim.phase, action.claim.shares_mb) == ("loading", {0: 50})


def test_a_model_that_needs_room_starts_with_clearing() -> None:
    action = one(a_fleet(a_node("a", [100], {"x": [90]})), incoming(mb=50))

    assert isinstance(action, Start)
    assert (action.claim.phase, action.claim.victims[0].place) == ("clearing", ("a", "x"))


def test_a_busy_model_is_closed_and_waited_for() -> None:
    action = one(a_fleet(a_node("a", [100], {"x": [90]}, busy=["x"])), incoming(mb=50))

    assert isinstance(action, Hold)
    assert (action.closing, action.why) == (
        frozenset({("a", "x")}),
        "waiting for x to finish on a",
    )


def test_who_waits_is_told_of_models_as_clients_call_them() -> None:
    snapshot = a_fleet(a_node("a", [100], {"file:/srv/x.gguf": [90]}, busy=["file:/srv/x.gguf"]))
    rules = Rules(names={"file:/srv/x.gguf": "x"})

    action = one(snapshot, incoming(mb=50), rules)

    assert isinstance(action, Hold)
    assert action.why == "waiting for x to finish on a"


def test_who_waits_for_no_memory_is_told_for_what() -> None:
    going = a_node("a", [100], {"m": [50]}, states={"m": "unloading"})

    action = one(a_fleet(going), incoming(mb=50))

    assert isinstance(action, Hold)
    assert action.why == "waiting for a: it is unloading there"


def test_nobody_is_closed_within_its_dwell() -> None:
    snapshot = a_fleet(a_node("a", [100], {"x": [90]}, busy=["x"]), loaded={("a", "x"): NOW - 3})

    action = one(snapshot, incoming(mb=50), Rules(min_dwell_seconds=10.0))

    assert isinstance(action, Hold)
    assert (action.closing, action.until) == (frozenset(), NOW + 7)
    assert action.why == "waiting for the turn of x on a, 7 s more"


def test_a_higher_class_is_never_closed() -> None:
    snapshot = a_fleet(a_node("a", [100], {"x": [90]}, busy=["x"]))

    action = one(snapshot, incoming(mb=50), Rules(classes={"x": 101}))

    assert isinstance(action, Refuse)
    assert action.error.code == "overloaded"


def test_what_can_never_be_is_refused_at_once() -> None:
    assert isinstance(one(a_fleet(a_node("a", [100])), incoming(mb=500)), Refuse)


def test_the_oldest_has_its_turn_first() -> None:
    snapshot = a_fleet(a_node("a", [100]))
    young = replace(incoming("young", mb=80), since=2.0)
    old = replace(incoming("old", mb=80), since=1.0)

    first, second = turns(snapshot, [young, old], Rules())

    assert isinstance(first, Start)
    assert first.incoming is old
    assert isinstance(second, Hold)
    assert second.why == "waiting for memory of a: others were first"


def test_a_younger_one_takes_nothing_that_an_older_one_waits_for() -> None:
    snapshot = a_fleet(a_node("a", [100], {"x": [60]}, busy=["x"]))
    old = replace(incoming("old", mb=90), since=1.0)
    small, large = (
        replace(incoming(name, mb=mb), since=2.0) for name, mb in (("small", 10), ("large", 20))
    )

    _, for_small = turns(snapshot, [old, small], Rules())
    _, for_large = turns(snapshot, [old, large], Rules())

    assert (isinstance(for_small, Start), isinstance(for_large, Hold)) == (True, True)


def test_models_on_different_nodes_start_at_the_same_time() -> None:
    snapshot = a_fleet(a_node("a", [100]), a_node("b", [100]))

    actions = turns(snapshot, [incoming("m", mb=80), incoming("n", mb=80)], Rules())

    assert all(isinstance(action, Start) for action in actions)


def test_a_model_that_would_fill_the_device_leaves_nothing_for_one_that_comes_with_it() -> None:
    greedy = dict.fromkeys("abc", Need(500, "estimate", least_mb=30))
    old = replace(incoming("old"), needs=greedy, since=1.0)
    young = replace(incoming("young"), needs=greedy, since=2.0)

    first, second = turns(a_fleet(a_node("a", [100])), [old, young], Rules())

    assert isinstance(first, Start)
    assert isinstance(second, Hold)


def test_nothing_starts_where_somebody_else_clears() -> None:
    snapshot = a_fleet(a_node("a", [100], {"x": [60], "y": [20]}))
    old, young = incoming("m", mb=30), replace(incoming("n", mb=10), since=1.0)

    first, second = turns(snapshot, [old, young], Rules())

    assert isinstance(first, Start)
    assert isinstance(second, Hold)


def test_a_choice_that_was_made_stays_made() -> None:
    node = a_node("a", [100], {"x": [50], "y": [50]}, busy=["x", "y"])
    rules = Rules(closing=frozenset({("a", "x")}))
    snapshot = a_fleet(node, used={("a", "x"): 9.0, ("a", "y"): 1.0})

    action = one(snapshot, incoming(mb=40), rules)

    assert isinstance(action, Hold)
    assert action.closing == {("a", "x")}


@dataclass
class Loaded:
    """A model on a node of the world; ``ends`` are when its requests will."""

    devices: tuple[int, ...]
    share: int
    loaded_at: int
    used: int
    ends: list[int] = field(default_factory=list)


@dataclass
class Load:
    """A load of the world, after what it has to clear."""

    claim: Claim
    ready_at: int | None = None


@dataclass
class World:
    """A fleet that does what ``turns`` says, one second after the other, and watches over it."""

    sizes: Sequence[Sequence[int]]
    models: Sequence[tuple[int, int, int]]
    """Size, devices and class of each."""
    strategy: Strategy = "lru"
    pinned: frozenset[Place] = frozenset()
    now: int = 0
    there: dict[Place, Loaded] = field(default_factory=dict)
    loads: dict[str, Load] = field(default_factory=dict)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    closing: frozenset[Place] = frozenset()
    swaps: list[tuple[int, str]] = field(default_factory=list)
    longest: int = 0
    refused: int = 0

    def profile(self, model: str) -> Profile:
        _, devices, residency_class = self.models[int(model[1:])]
        return Profile(model, min_devices=devices, residency_priority=residency_class)

    def rules(self) -> Rules:
        classes = {f"m{i}": known[2] for i, known in enumerate(self.models)}
        going = {v.place for load in self.loads.values() for v in load.claim.victims}
        return Rules(self.strategy, DWELL, classes, closing=self.closing | going)

    def snapshot(self) -> FleetSnapshot:
        nodes = []
        for index, sizes in enumerate(self.sizes):
            name = "abc"[index]
            held = {
                model: [kept.share if d in kept.devices else 0 for d in range(len(sizes))]
                for (node, model), kept in self.there.items()
                if node == name
            }
            busy = [m for (n, m), kept in self.there.items() if n == name and kept.ends]
            nodes.append(a_node(name, sizes, held, busy, filling=self.filling(name)))
        return FleetSnapshot(
            tuple(nodes),
            {},
            now=self.now,
            loaded_at={place: kept.loaded_at for place, kept in self.there.items()},
            last_used={place: kept.used for place, kept in self.there.items()},
            pinned=self.pinned,
        )

    def filling(self, node: str) -> dict[int, int]:
        """Return what loads have taken by now: half of it after a second."""
        taken: Counter[int] = Counter()
        for load in self.loads.values():
            if load.claim.place[0] == node and load.ready_at == self.now + 1:
                taken.update({d: share // 2 for d, share in load.claim.shares_mb.items()})
        return taken

    def ask(self, model: str) -> None:
        going = self.rules().closing
        open_places = [p for p in self.there if p[1] == model and p not in going]
        if open_places:
            self.serve(open_places[0])
        else:
            self.waiting.setdefault(model, []).append(self.now)

    def serve(self, place: Place) -> None:
        kept = self.there[place]
        kept.ends.append(self.now + DURATION)
        kept.used = self.now

    def step(self, asked: Sequence[str]) -> None:
        self.now += 1
        for kept in self.there.values():
            kept.ends = [end for end in kept.ends if end > self.now]
        for model in asked:
            self.ask(model)
        self.carry_on()
        self.decide()
        self.check()

    def carry_on(self) -> None:
        """Clear one victim a second, then load for some seconds."""
        for model, load in list(self.loads.items()):
            gone = [v.place for v in load.claim.victims if v.place in self.there]
            if gone:
                self.evict(gone[0], model)
            elif load.ready_at is None:
                node = next(n for n in self.snapshot().nodes if n.name == load.claim.place[0])
                load.claim = replace(
                    load.claim, phase="loading", victims=(), accounted_mb=accounted_mb(node)
                )
                load.ready_at = self.now + LOAD
            elif load.ready_at <= self.now:
                del self.loads[model]
                shares = load.claim.shares_mb
                self.there[load.claim.place] = Loaded(
                    tuple(shares), max(shares.values()), self.now, self.now
                )
                for since in self.waiting.pop(model):
                    self.longest = max(self.longest, self.now - since)
                    self.serve(load.claim.place)

    def evict(self, place: Place, incoming_model: str) -> None:
        kept = self.there.pop(place)
        rank = {f"m{i}": known[2] for i, known in enumerate(self.models)}
        assert not kept.ends, "a busy model was evicted"
        assert place not in self.pinned, "a pinned model was evicted"
        assert self.now - kept.loaded_at >= DWELL, "a model was evicted within its dwell"
        assert rank[place[1]] <= rank[incoming_model], "a higher class was evicted"
        self.swaps.append((self.now, place[1]))

    def decide(self) -> None:
        wishes = [
            Incoming(
                Target(model, model, self.profile(model)),
                self.profile(model),
                dict.fromkeys("abc", Need(self.models[int(model[1:])][0], "measured")),
                since=min(since),
            )
            for model, since in self.waiting.items()
            if model not in self.loads
        ]
        claims = [load.claim for load in self.loads.values()]
        actions = turns(self.snapshot(), wishes, self.rules(), claims)
        held = [action for action in actions if isinstance(action, Hold)]
        self.closing = frozenset[Place]().union(*(hold.closing for hold in held))
        for action in actions:
            model = action.incoming.node_id
            if isinstance(action, Start):
                self.loads[model] = Load(action.claim)
            elif isinstance(action, Refuse):
                self.refused += len(self.waiting.pop(model))

    def free(self, node: str) -> list[int]:
        sizes = list(self.sizes["abc".index(node)])
        for (name, _), kept in self.there.items():
            if name == node:
                for device in kept.devices:
                    sizes[device] -= kept.share
        return sizes

    def check(self) -> None:
        for index in range(len(self.sizes)):
            name = "abc"[index]
            left = self.free(name)
            for load in self.loads.values():
                if load.claim.place[0] == name and load.ready_at is not None:
                    for device, share in load.claim.shares_mb.items():
                        left[device] -= share
            assert min(left) >= 0, f"more than the memory of {name} is promised"
        bound = (len(self.models) + 1) * (DWELL + DURATION + LOAD + SLACK)
        for model, since in self.waiting.items():
            assert self.now - min(since) <= bound, f"{model} starves"


WORLDS = st.builds(
    World,
    sizes=st.lists(st.lists(st.integers(8, 16), min_size=1, max_size=2), min_size=1, max_size=2),
    models=st.lists(
        st.tuples(st.integers(1, 16), st.integers(1, 2), st.sampled_from([50, 100, 100, 100])),
        min_size=2,
        max_size=5,
    ),
    strategy=st.sampled_from(["lru", "priority"]),
    pinned=st.sampled_from([frozenset(), frozenset({("a", "m0")})]),
)
SECONDS = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(WORLDS, SECONDS)
@example(World([[10]], [(8, 1, 100), (8, 1, 100), (8, 1, 100)]), [[0, 1, 2]])
@example(World([[10]], [(6, 1, 100), (6, 1, 100), (3, 1, 100)]), [[0, 2], [1, 2]])
def test_no_schedule_starves_a_model_or_breaks_a_rule(
    world: World, asked: Sequence[Sequence[int]]
) -> None:
    for second in range(150):
        wanted = asked[second % len(asked)]

        world.step([f"m{index % len(world.models)}" for index in wanted])


@settings(max_examples=50, deadline=None)
@given(SECONDS)
def test_what_everybody_wants_all_the_time_is_swapped_once_in_a_dwell(
    asked: Sequence[Sequence[int]],
) -> None:
    world = World([[10]], [(8, 1, 100), (8, 1, 100)])

    for second in range(120):
        wanted = asked[second % len(asked)]
        world.step(["m0", "m1", *(f"m{index % 2}" for index in wanted)])

    times = [when for when, _ in world.swaps]
    assert all(later - earlier >= DWELL for earlier, later in pairwise(times))
    assert {model for _, model in world.swaps} == {"m0", "m1"}
    assert world.refused == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_models_that_alternate_are_served_together_and_in_turn(count: int) -> None:
    world = World([[10]], [(8, 1, 100)] * count)

    for _ in range(300):
        world.step([f"m{index}" for index in range(count)])

    goes = [model for _, model in world.swaps]
    assert len(goes) <= 300 / DWELL
    rounds = [goes[i : i + count] for i in range(0, len(goes) - count, count)]
    assert all(len(set(each)) == count for each in rounds)
