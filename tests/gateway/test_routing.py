"""Which replica takes a request, and what else may have to happen; all of it pure."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.gateway.affinity import Session
from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.routing import Load, Refuse, Serve, Wait, choose, decide, replicas
from cortex.ipc.node_api import (
    Activation,
    Health,
    ModelInfo,
    ModelLoad,
    ModelStatus,
    Servable,
)

TARGET = Target("m", "m", Profile("m"))
STRANGER = Target("m", "m", None)


def node(
    name: str,
    status: ModelStatus | None = "loaded",
    *,
    busy: int = 0,
    own: int = 0,
    servable: Servable = Servable(ok=True),  # noqa: B008  # frozen
) -> Node:
    """Return a healthy node that has the model ``m`` in state *status*."""
    models = [] if status is None else [ModelInfo("m", "torch", status, [], servable)]
    health = Health(1.0, models=[ModelLoad("m", in_flight=busy - 1, queue_depth=1)])
    return Node(name, f"http://{name}").answered(health, models, {"m": own}, now=1.0)


def down(node: Node) -> Node:
    return replace(node, is_healthy=False)


def draining(node: Node) -> Node:
    return replace(node, health=Health(1.0, draining=True))


def resting(node: Node, seconds: float = 2.5) -> Node:
    return replace(node, breaker="open", resting_seconds=seconds)


FULL = Servable(ok=False, reason="overloaded", detail="1 of 1")
SESSION = Session("s", 1.25)


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
        replace(node("a"), is_drained=True),
        resting(node("a")),
        replace(resting(node("a")), breaker="half_open"),
        node("a", "recovering"),
        node("a", servable=Servable(ok=False, reason="no_memory")),
    ],
    ids=["down", "draining", "drained", "broken", "tried", "recovering", "unservable"],
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


def test_a_recovering_model_is_not_loaded_twice() -> None:
    snapshot = fleet(node("a", "recovering"), node("b", None))

    assert refused(snapshot, TARGET) == (503, "recovering", 2)


def test_a_model_that_is_being_unloaded_may_be_loaded_again_by_who_knows_how() -> None:
    snapshot = fleet(node("a", "unloading"))

    assert decide(snapshot, TARGET) == Load()
    assert refused(snapshot, STRANGER) == (503, "recovering", 2)


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


@pytest.mark.parametrize("target", [TARGET, STRANGER], ids=["in the catalogue", "not"])
def test_a_breaker_is_waited_for_and_nothing_is_loaded_elsewhere(target: Target) -> None:
    snapshot = fleet(resting(node("a")), resting(node("b"), 9.0), node("c", None))

    assert refused(snapshot, target) == (503, "recovering", 3)


def test_a_breaker_of_the_only_node_is_named() -> None:
    decision = decide(fleet(resting(node("a"))), TARGET)

    assert isinstance(decision, Refuse)
    assert str(decision.error).endswith("node a has just failed")


def test_a_broken_node_that_is_drained_too_is_not_waited_for() -> None:
    leaving = replace(resting(node("a")), is_drained=True)

    assert decide(fleet(leaving, node("b", None)), TARGET) == Load()


def test_a_model_that_nobody_has_is_404() -> None:
    assert refused(fleet(node("a", None))) == (404, "model_not_found", None)


def choice(snapshot: FleetSnapshot, session: Session | None = SESSION) -> tuple[str, str]:
    decision = decide(snapshot, TARGET, session=session)
    assert isinstance(decision, Serve)
    return decision.node.name, decision.reason


def home_and_others(*names: str) -> list[str]:
    return sorted(names, key=SESSION.rank, reverse=True)


def test_a_session_goes_home_though_another_replica_has_less_to_do() -> None:
    home, other = home_and_others("a", "b")

    assert choice(fleet(node(home, busy=2), node(other, busy=0))) == (home, "session-home")


def test_a_session_leaves_a_home_that_is_much_busier_than_the_others() -> None:
    home, second, third = home_and_others("a", "b", "c")
    snapshot = fleet(node(home, busy=9), node(second, busy=2), node(third, busy=0))

    assert choice(snapshot) == (second, "session-moved")


def test_a_session_leaves_a_home_that_is_full() -> None:
    home, second = home_and_others("a", "b")
    snapshot = fleet(node(home, busy=1, servable=FULL), node(second, busy=9))

    assert choice(snapshot) == (second, "session-moved")


def test_where_all_are_full_a_session_goes_home() -> None:
    home, second = home_and_others("a", "b")
    snapshot = fleet(*(node(name, busy=2, servable=FULL) for name in (home, second)))

    assert choice(snapshot) == (home, "session-home")


def test_what_has_no_session_goes_where_least_is_to_do() -> None:
    assert choice(fleet(node("a", busy=2), node("b", busy=1)), None) == ("b", "least-loaded")


def test_a_session_without_a_choice_has_no_home() -> None:
    assert choice(fleet(node("a", busy=9))) == ("a", "only-replica")


@st.composite
def fleets(draw: st.DrawFn) -> FleetSnapshot:
    """Draw up to six nodes in any state, with any load."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    own = {(name, "m"): draw(st.integers(0, 20)) for name in names}
    return fleet(*(draw(nodes(name)) for name in names), own=own)


@st.composite
def nodes(draw: st.DrawFn, name: str) -> Node:
    """Draw a node in any state."""
    status = st.sampled_from(["loaded"] * 4 + ["loading", "recovering", "failed", None])
    servable = st.sampled_from([Servable(ok=True)] * 3 + [FULL, Servable(ok=False, reason="?")])
    drawn = node(
        name,
        draw(status),  # type: ignore[arg-type]  # one of ModelStatus
        busy=draw(st.integers(0, 20)),
        servable=draw(servable),
    )
    changes: list[dict[str, Any]] = [
        {},
        {"is_healthy": False},
        {"is_drained": True},
        {"breaker": "open", "resting_seconds": 1.0},
        {"breaker": "half_open", "resting_seconds": 1.0},
        {"breaker": "half_open"},
    ]
    return replace(drawn, **draw(st.sampled_from([{}] * 5 + changes)))


SESSIONS = st.none() | st.builds(Session, st.text(max_size=4), st.floats(1.0, 4.0))
EXCLUDED = st.frozensets(st.sampled_from("abcdef"), max_size=3)


@given(fleets(), EXCLUDED, SESSIONS)
def test_only_a_node_that_can_and_may_is_asked(
    snapshot: FleetSnapshot, excluded: frozenset[str], session: Session | None
) -> None:
    decision = decide(snapshot, TARGET, excluded, session)

    able = {known.name for known in replicas(snapshot, "m", excluded)}
    assert isinstance(decision, Serve) == bool(able)
    if isinstance(decision, Serve):
        model = decision.node.model("m")
        assert decision.node.name in able - excluded
        assert decision.node.takes_requests
        assert model is not None
        assert model.status == "loaded"


@given(fleets(), EXCLUDED, SESSIONS, st.randoms())
def test_the_same_fleet_in_any_order_gives_the_same_answer(
    snapshot: FleetSnapshot, excluded: frozenset[str], session: Session | None, shuffled: Any
) -> None:
    order = list(snapshot.nodes)
    shuffled.shuffle(order)

    here = choose(snapshot, "m", excluded, session)
    there = choose(replace(snapshot, nodes=tuple(order)), "m", excluded, session)

    assert here == there


@given(fleets(), SESSIONS)
def test_nobody_is_sent_where_it_is_too_busy_or_full_without_need(
    snapshot: FleetSnapshot, session: Session | None
) -> None:
    chosen = choose(snapshot, "m", session=session)
    if chosen is None:
        return

    able = replicas(snapshot, "m")
    alike = [known for known in able if is_full(known) == is_full(able[0])]
    loads = [snapshot.load_of(known, "m") for known in alike]
    bound = session.load_factor * sum(loads) / len(loads) + 1 if session else min(loads)
    assert chosen.node in alike
    assert snapshot.load_of(chosen.node, "m") <= bound


@given(fleets(), st.text(max_size=4))
def test_a_home_is_left_only_where_it_is_too_busy_full_or_gone(
    snapshot: FleetSnapshot, key: str
) -> None:
    session = Session(key, 1.25)
    chosen = choose(snapshot, "m", session=session)
    if chosen is None or chosen.reason != "session-moved":
        return

    able = replicas(snapshot, "m")
    home = max(able, key=lambda known: session.rank(known.name))
    loads = [snapshot.load_of(known, "m") for known in able if is_full(known) == is_full(able[0])]
    is_busy = session.is_too_busy(snapshot.load_of(home, "m"), loads)
    assert is_busy or is_full(home)


def is_full(known: Node) -> bool:
    model = known.model("m")
    return model is not None and model.servable.is_full


def at_its_bound(node: Node) -> Node:
    return replace(node, is_engine=True, is_full=True)


def test_an_engine_that_has_all_it_may_have_gets_no_more() -> None:
    decision = decide(fleet(at_its_bound(node("a"))), TARGET)

    assert isinstance(decision, Refuse)
    assert (decision.error.code, decision.error.retry_after_seconds) == ("overloaded", 1)
    assert decision.node is None


@pytest.mark.parametrize("session", [None, SESSION])
def test_others_come_before_an_engine_at_its_bound(session: Session | None) -> None:
    busy = node("b", busy=9, servable=FULL)

    serve = choose(fleet(at_its_bound(node("a")), busy), "m", session=session)

    assert serve is not None
    assert serve.node.name == "b"


def test_a_model_that_loads_elsewhere_is_waited_for_where_an_engine_is_at_its_bound() -> None:
    decision = decide(fleet(at_its_bound(node("a")), node("b", "loading")), TARGET)

    assert isinstance(decision, Wait)


def test_an_engine_at_its_bound_is_still_a_replica() -> None:
    snapshot = fleet(at_its_bound(node("a")), node("b", busy=9))

    assert [found.name for found in replicas(snapshot, "m")] == ["b", "a"]
