"""What we know of a node, and what a poll changes of it."""

from typing import Any

import pytest

from cortex.gateway.config import Neuron
from cortex.gateway.fleet import Fleet, Node
from cortex.ipc.node_api import Activation, DeviceHealth, Health, ModelInfo, ModelLoad, Servable


def up(node: Node, now: float = 1.0) -> Node:
    return node.answered(Health(1.0), [], {}, now)


def test_a_node_is_down_until_it_has_answered() -> None:
    assert not Node("a", "http://a").takes_requests


def test_one_success_brings_a_node_up() -> None:
    node = up(Node("a", "http://a").missed("refused", 1.0).missed("refused", 2.0), 3.0)

    assert (node.is_healthy, node.since, node.failures, node.error) == (True, 3.0, 0, None)


def test_two_strikes_leave_a_node_up() -> None:
    node = up(Node("a", "http://a")).missed("slow", 2.0).missed("slow", 3.0)

    assert (node.is_healthy, node.since, node.error) == (True, 1.0, "slow")


def test_three_strikes_take_a_node_down() -> None:
    node = up(Node("a", "http://a")).missed("slow", 2.0).missed("slow", 3.0).missed("slow", 4.0)

    assert (node.is_healthy, node.since) == (False, 4.0)


def test_a_success_in_between_forgives() -> None:
    node = up(Node("a", "http://a")).missed("slow", 2.0).missed("slow", 3.0)

    assert up(node, 4.0).missed("slow", 5.0).is_healthy


@pytest.mark.parametrize("status", ["loading", "recovering", "unloading"])
def test_a_model_on_its_way_makes_a_node_worth_watching(status: str) -> None:
    info = ModelInfo("m", "torch", status, [], Servable(ok=False))  # type: ignore[arg-type]  # param

    assert Node("a", "http://a").answered(Health(1.0), [info], {}, 1.0).is_loading


@pytest.mark.parametrize(("state", "is_loading"), [("starting", True), ("poisoned", False)])
def test_a_device_on_its_way_makes_a_node_worth_watching(state: Any, is_loading: bool) -> None:
    health = Health(1.0, [DeviceHealth(0, "cpu:0", state)])

    assert Node("a", "http://a").answered(health, [], {}, 1.0).is_loading is is_loading


def test_a_node_that_starts_is_worth_watching() -> None:
    health = Health(1.0, activation=Activation("pre_warming"))

    assert Node("a", "http://a").answered(health, [], {}, 1.0).is_loading


def test_requests_are_counted_while_they_run() -> None:
    fleet = Fleet([Neuron("a", "http://a")])

    with fleet.holding("a", "m"), fleet.holding("a", "m"):
        during = fleet.own("a")

    assert (during, fleet.own("a"), fleet.snapshot().own) == ({"m": 2}, {}, {})


def test_a_request_that_fails_is_counted_back() -> None:
    fleet = Fleet([Neuron("a", "http://a")])

    with pytest.raises(ZeroDivisionError), fleet.holding("a", "m"):
        raise ZeroDivisionError

    assert fleet.own("a") == {}


def test_of_a_node_that_is_gone_or_moved_nothing_is_remembered() -> None:
    neurons = [Neuron(name, f"http://{name}:1") for name in "abc"]
    fleet = Fleet(neurons)
    info = ModelInfo("m", "torch", "loaded", [], Servable(ok=True))
    for name in "abc":
        fleet.put(fleet.node(name).answered(Health(1.0), [info], {}, 1.0))
        with fleet.holding(name, "m"):
            fleet.stay((name, "m"), 5.0)

    fleet.configure([neurons[0], Neuron("b", "http://elsewhere:1")])

    snapshot = fleet.snapshot()
    assert [(node.name, node.is_healthy) for node in snapshot.nodes] == [("a", True), ("b", False)]
    for times in (snapshot.loaded_at, snapshot.last_used, snapshot.stay_seconds):
        assert set(times) == {("a", "m")}


def test_a_model_that_others_use_is_not_idle() -> None:
    now = 100.0
    fleet = Fleet([Neuron("a", "http://a")], clock=lambda: now)
    info = ModelInfo("m", "torch", "loaded", [], Servable(ok=True))
    busy = Health(1.0, models=[ModelLoad("m", in_flight=1)])
    fleet.put(fleet.node("a").answered(Health(1.0), [info], {}, 1.0))

    now = 200.0
    before = fleet.snapshot().idle_seconds(("a", "m"))
    fleet.put(fleet.node("a").answered(busy, [info], {}, 2.0))
    now = 201.0

    assert (before, fleet.snapshot().idle_seconds(("a", "m"))) == (100.0, 1.0)
