"""Which replica takes a request, and what else may have to happen; all of it pure."""

from dataclasses import replace

import pytest

from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.placement import place
from cortex.gateway.routing import Load, Refuse, Serve, Wait, decide
from cortex.ipc.errors import Recovering
from cortex.ipc.node_api import (
    Activation,
    DeviceHealth,
    Health,
    ModelInfo,
    ModelLoad,
    ModelStatus,
    Servable,
)

PROFILE = Profile("m")
TARGET = Target("m", "m", PROFILE)
STRANGER = Target("m", "m", None)


def node(
    name: str,
    status: ModelStatus | None = "loaded",
    *,
    busy: int = 0,
    own: int = 0,
    free_mb: int = 0,
    servable: Servable = Servable(ok=True),  # noqa: B008  # frozen
) -> Node:
    """Return a healthy node that has the model ``m`` in state *status*."""
    models = [] if status is None else [ModelInfo("m", "torch", status, [], servable)]
    devices = [
        DeviceHealth(0, "cpu:0", "ready", vram_free_mb=free_mb),
        DeviceHealth(1, "cpu:1", "poisoned", vram_free_mb=9999),
        DeviceHealth(2, "cpu:2", "ready"),
    ]
    health = Health(
        1.0, devices=devices, models=[ModelLoad("m", in_flight=busy - 1, queue_depth=1)]
    )
    return Node(name, f"http://{name}").answered(health, models, {"m": own}, now=1.0)


def down(node: Node) -> Node:
    return replace(node, is_healthy=False)


def draining(node: Node) -> Node:
    return replace(node, health=Health(1.0, draining=True))


def fleet(*nodes: Node, own: dict[tuple[str, str], int] | None = None) -> FleetSnapshot:
    return FleetSnapshot(nodes, own or {})


def served_by(snapshot: FleetSnapshot, *excluded: str) -> str:
    decision = decide(snapshot, TARGET, frozenset(excluded))
    assert isinstance(decision, Serve)
    return decision.node.name


def refused(snapshot: FleetSnapshot, target: Target = STRANGER) -> tuple[int, str, int | None]:
    decision = decide(snapshot, target)
    assert isinstance(decision, Refuse)
    error = decision.error
    return error.status, error.code, error.retry_after_seconds


def test_the_least_busy_replica_serves() -> None:
    assert served_by(fleet(node("a", busy=2), node("b", busy=1), node("c", busy=3))) == "b"


def test_a_full_replica_is_the_last_choice_and_still_one() -> None:
    full = node("a", busy=1, servable=Servable(ok=False, reason="overloaded", detail="1 of 1"))

    assert served_by(fleet(full, node("b", busy=9))) == "b"
    assert served_by(fleet(full)) == "a"


def test_ties_go_by_name() -> None:
    assert served_by(fleet(node("b", busy=1), node("a", busy=1))) == "a"


def test_our_own_requests_since_the_poll_count() -> None:
    snapshot = fleet(node("a", busy=1), node("b", busy=2), own={("a", "m"): 2})

    assert served_by(snapshot) == "b"


def test_our_own_requests_that_have_ended_since_the_poll_do_not_count() -> None:
    assert served_by(fleet(node("a", busy=5, own=5), node("b", busy=1))) == "a"


def test_a_replica_that_failed_the_request_is_not_asked_again() -> None:
    assert served_by(fleet(node("a"), node("b", busy=9)), "a") == "b"


@pytest.mark.parametrize(
    "unfit",
    [
        down(node("a")),
        draining(node("a")),
        node("a", "recovering"),
        node("a", servable=Servable(ok=False, reason="no_memory")),
    ],
    ids=["down", "draining", "recovering", "unservable"],
)
def test_an_unfit_replica_is_passed_over(unfit: Node) -> None:
    assert served_by(fleet(unfit, node("b", busy=9))) == "b"


def test_the_reason_tells_whether_there_was_a_choice() -> None:
    one, two = decide(fleet(node("a")), TARGET), decide(fleet(node("a"), node("b")), TARGET)

    assert isinstance(one, Serve)
    assert isinstance(two, Serve)
    assert (one.reason, two.reason) == ("only-replica", "least-loaded")


def test_a_model_on_its_way_is_waited_for() -> None:
    decision = decide(fleet(node("a", None), node("b", "loading")), TARGET)

    assert isinstance(decision, Wait)
    assert decision.node.name == "b"


def test_a_model_that_a_node_will_load_at_its_start_is_waited_for() -> None:
    starting = replace(node("a", None), health=Health(1.0, activation=Activation(pending=["m"])))

    assert isinstance(decide(fleet(starting), TARGET), Wait)


def test_a_cold_model_of_the_catalogue_is_loaded() -> None:
    assert decide(fleet(node("a", None)), TARGET) == Load()


def test_a_load_that_failed_may_be_tried_again() -> None:
    assert decide(fleet(node("a", "failed")), TARGET) == Load()


@pytest.mark.parametrize("status", ["recovering", "unloading"])
def test_a_recovering_model_is_not_loaded_twice(status: ModelStatus) -> None:
    assert refused(fleet(node("a", status), node("b", None)), TARGET) == (503, "recovering", 2)


def test_a_model_that_cannot_be_served_says_why() -> None:
    unfit = node("a", servable=Servable(ok=False, reason="low_memory", detail="3 MB left"))

    decision = decide(fleet(unfit), TARGET)

    assert isinstance(decision, Refuse)
    assert "3 MB left" in str(decision.error)


def test_without_a_node_that_is_up_it_is_503() -> None:
    assert refused(fleet(down(node("a", None)))) == (503, "recovering", 5)


def test_a_model_whose_only_node_is_down_is_503() -> None:
    assert refused(fleet(down(node("a")), node("b", None))) == (503, "recovering", 3)


@pytest.mark.parametrize(
    ("snapshot", "words"),
    [
        (
            fleet(down(node("a", None)), draining(node("b", None))),
            "no node can take 'm' now: node a is down, node b is draining",
        ),
        (
            fleet(down(node("a")), node("b", None)),
            "'m' cannot be served now: node a is down",
        ),
    ],
)
def test_the_nodes_that_are_away_are_named(snapshot: FleetSnapshot, words: str) -> None:
    decision = decide(snapshot, Target("m", "m", None))

    assert isinstance(decision, Refuse)
    assert str(decision.error) == words


def test_a_model_that_nobody_has_is_404() -> None:
    assert refused(fleet(node("a", None))) == (404, "model_not_found", None)


def test_a_cold_model_goes_where_most_memory_is_free() -> None:
    snapshot = fleet(node("a", None, free_mb=1), node("b", None, free_mb=3), node("c", None))

    assert place(snapshot, PROFILE).node.name == "b"


def test_memory_of_devices_that_are_not_ready_does_not_count() -> None:
    assert node("a", free_mb=5).free_mb == 5


def test_a_pinned_model_goes_nowhere_else() -> None:
    snapshot = fleet(node("a", None, free_mb=1), node("b", None, free_mb=3))

    assert place(snapshot, Profile("m", pinned_on=("a",))).node.name == "a"


def test_a_pinned_model_whose_node_is_down_is_503() -> None:
    snapshot = fleet(down(node("a", None)), node("b", None))

    with pytest.raises(Recovering, match="may run on a, and none of them"):
        place(snapshot, Profile("m", pinned_on=("a",)))
