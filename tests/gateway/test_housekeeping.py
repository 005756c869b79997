"""What the gateway decides to do by itself, row by row."""

from dataclasses import replace
from typing import Any

import pytest

from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Eviction
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.housekeeping import Act, Preload, Restart, Unload, due, preloads
from cortex.ipc.node_api import (
    Activation,
    DeviceHealth,
    Health,
    ModelDevice,
    ModelInfo,
    ModelLoad,
    Servable,
)

IDLE_AFTER_TEN = Eviction(idle_unload_seconds=10.0)
NEVER = Eviction()
NOW = 1e10
AWAY = Catalogue({"m": Profile("m", preload=True)})


def loaded(model: str = "m", status: Any = "loaded") -> ModelInfo:
    return ModelInfo(model, "torch", status, [ModelDevice(0)], Servable(ok=True))


def node(*models: ModelInfo, name: str = "a", cycles: int = 0, **changes: Any) -> Node:
    device = DeviceHealth(0, "cpu:0", "ready", lifecycle_cycles=cycles)
    up = Node(name, f"http://{name}").answered(Health(1.0, [device]), models, {}, now=5.0)
    return replace(up, **changes)


def seen(*nodes: Node, idle: float = 0.0, model: str = "m", **changes: Any) -> FleetSnapshot:
    """Return a snapshot in which every place has been idle for so many seconds."""
    loaded_at = {(known.name, model): NOW - idle for known in nodes}
    return FleetSnapshot(nodes, own={}, now=NOW, loaded_at=loaded_at, **changes)


@pytest.mark.parametrize(
    ("idle", "profile", "stay", "is_unloaded"),
    [
        (10.0, None, None, True),
        (9.9, None, None, False),
        (10.0, Profile("m", idle_unload_seconds=60.0), None, False),
        (60.0, Profile("m", idle_unload_seconds=60.0), None, True),
        (1e9, Profile("m", idle_unload_seconds=0.0), None, False),
        (0.0, None, 0.0, True),
        (10.0, None, 300.0, False),
        (300.0, None, 300.0, True),
        (1e9, Profile("m", idle_unload_seconds=60.0), float("inf"), False),
    ],
)
def test_a_model_goes_when_it_has_been_idle_for_as_long_as_it_may(
    idle: float, profile: Profile | None, stay: float | None, is_unloaded: bool
) -> None:
    catalogue = Catalogue({"m": profile} if profile else {})
    stays = {} if stay is None else {("a", "m"): stay}

    acts = due(seen(node(loaded()), idle=idle, stay_seconds=stays), catalogue, IDLE_AFTER_TEN)

    assert acts == ([Unload("a", "m", "idle")] if is_unloaded else [])


def test_without_a_word_from_anybody_a_model_stays() -> None:
    assert due(seen(node(loaded()), idle=1e9), Catalogue(), NEVER) == []


def test_the_profile_of_a_model_with_another_name_on_nodes_counts() -> None:
    profile = Profile("m", source="file:/m.gguf", idle_unload_seconds=5.0)
    place = loaded("file:/m.gguf")

    acts = due(seen(node(place), idle=6.0, model="file:/m.gguf"), Catalogue({"m": profile}), NEVER)

    assert acts == [Unload("a", "file:/m.gguf", "idle")]


LONG_IDLE = seen(node(loaded()), idle=1e6)


@pytest.mark.parametrize(
    "snapshot",
    [
        replace(LONG_IDLE, pinned=frozenset({("a", "m")})),
        replace(LONG_IDLE, own={("a", "m"): 1}),
        replace(LONG_IDLE, last_used={("a", "m"): NOW - 5.0}),
        seen(node(loaded(), health=Health(1.0, models=[ModelLoad("m", in_flight=1)])), idle=1e6),
        seen(node(loaded(), health=Health(1.0, models=[ModelLoad("m", queue_depth=1)])), idle=1e6),
        seen(node(loaded(), is_engine=True), idle=1e6),
        seen(node(loaded(), is_healthy=False), idle=1e6),
        seen(node(loaded(), failures=1), idle=1e6),
        seen(node(loaded(status="loading")), idle=1e6),
        seen(node(loaded(status="recovering")), idle=1e6),
    ],
    ids=[
        "pinned",
        "ours runs",
        "used lately",
        "somebody else's runs",
        "somebody else's waits",
        "an engine's",
        "node down",
        "not polled since",
        "loading",
        "recovering",
    ],
)
def test_what_is_needed_or_not_ours_is_not_unloaded(snapshot: FleetSnapshot) -> None:
    assert due(snapshot, Catalogue(), IDLE_AFTER_TEN) == []


def test_a_node_that_is_drained_loses_its_models_pinned_or_not() -> None:
    drained = node(loaded(), is_drained=True)

    acts = due(seen(drained, pinned=frozenset({("a", "m")})), Catalogue(), NEVER)

    assert acts == [Unload("a", "m", "drained")]


def test_a_drain_waits_for_what_runs() -> None:
    drained = node(loaded(), is_drained=True)

    assert due(replace(seen(drained), own={("a", "m"): 1}), Catalogue(), NEVER) == []


def test_an_engine_that_is_drained_keeps_its_models() -> None:
    assert due(seen(node(loaded(), is_drained=True, is_engine=True)), Catalogue(), NEVER) == []


@pytest.mark.parametrize(
    ("cycles", "defrag_after", "is_due"), [(50, 50, True), (49, 50, False), (9999, 0, False)]
)
def test_an_idle_device_is_restarted_after_so_many_loads(
    cycles: int, defrag_after: int, is_due: bool
) -> None:
    acts = due(seen(node(cycles=cycles)), Catalogue(), Eviction(defrag_after_cycles=defrag_after))

    assert acts == ([Restart("a", 0)] if is_due else [])


@pytest.mark.parametrize("status", ["loading", "loaded", "recovering", "unloading"])
def test_a_device_with_a_model_on_it_is_not_restarted(status: str) -> None:
    assert due(seen(node(loaded(status=status), cycles=50)), Catalogue(), NEVER) == []


def test_a_model_that_failed_to_load_holds_no_device() -> None:
    acts = due(seen(node(loaded(status="failed"), cycles=50)), Catalogue(), NEVER)

    assert acts == [Restart("a", 0)]


def test_a_model_on_another_device_does_not_matter() -> None:
    elsewhere = ModelInfo("m", "torch", "loaded", [ModelDevice(1)], Servable(ok=True))

    assert due(seen(node(elsewhere, cycles=50)), Catalogue(), NEVER) == [Restart("a", 0)]


@pytest.mark.parametrize("state", ["starting", "restarting", "poisoned", "stopped"])
def test_a_device_that_is_not_ready_is_not_restarted(state: Any) -> None:
    device = DeviceHealth(0, "cpu:0", state, lifecycle_cycles=50)

    assert due(seen(node(health=Health(1.0, [device]))), Catalogue(), NEVER) == []


def test_a_device_is_not_restarted_under_a_load_that_is_on_its_way() -> None:
    worn = node(cycles=50)
    warming = Health(1.0, worn.health.devices if worn.health else [], Activation("pre_warming"))

    assert due(seen(worn), Catalogue(), NEVER, loading={"a"}) == []
    assert due(seen(replace(worn, health=warming)), Catalogue(), NEVER) == []


def chances(*rounds: list[Node], catalogue: Catalogue = AWAY) -> list[list[Act]]:
    """Return what is preloaded in each of *rounds*."""
    known: dict[str, Any] = {}
    found: list[list[Act]] = []
    for nodes in rounds:
        acts, known = preloads(seen(*nodes), catalogue, known)
        found.append([*acts])
    return found


DOWN = Node("a", "http://a")


def test_a_model_is_preloaded_once_when_a_node_comes_up() -> None:
    assert chances([DOWN], [node()], [node()]) == [[], [Preload("m")], []]


def test_a_model_gets_another_chance_with_every_node_that_comes_up() -> None:
    again = [node(), node(name="b", since=9.0)]

    assert chances([node()], again) == [[Preload("m")], [Preload("m")]]
    assert chances([node()], [DOWN], [node(since=9.0)]) == [[Preload("m")], [], [Preload("m")]]


def test_a_node_that_is_undrained_is_another_chance() -> None:
    drained = node(is_drained=True)

    assert chances([drained], [node()]) == [[], [Preload("m")]]


@pytest.mark.parametrize("status", ["loaded", "loading", "recovering"])
def test_what_is_there_is_not_preloaded(status: str) -> None:
    assert chances([node(loaded(status=status))]) == [[]]


def test_what_was_there_and_was_unloaded_is_not_preloaded() -> None:
    assert chances([node(loaded())], [node()]) == [[], []]


def test_what_is_on_a_node_that_is_down_is_preloaded() -> None:
    gone = node(loaded(), name="b", is_healthy=False)

    assert chances([gone, node()]) == [[Preload("m")]]


def test_a_model_is_preloaded_only_where_it_may_be() -> None:
    bound = Catalogue({"m": Profile("m", preload=True, pinned_on=("b",))})

    assert chances([node()], [node(), node(name="b")], catalogue=bound) == [[], [Preload("m")]]


def test_an_engine_is_no_chance() -> None:
    assert chances([node(is_engine=True)]) == [[]]


def test_what_nobody_wants_preloaded_is_not() -> None:
    assert chances([node()], catalogue=Catalogue({"m": Profile("m")})) == [[]]
