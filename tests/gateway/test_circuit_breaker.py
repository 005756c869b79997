"""A node's breaker, row by row, and what the fleet makes of it."""

import pytest

from cortex.gateway.circuit_breaker import CLOSED, Breaker, BreakerState, is_failure
from cortex.gateway.config import Neuron, Routing
from cortex.gateway.errors import Relayed
from cortex.gateway.fleet import Fleet, Node
from cortex.ipc.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    NodeFailed,
    NodeTimeout,
    Overloaded,
    RateLimitExceeded,
)
from cortex.ipc.node_api import Health

OPEN_SECONDS = 5.0
RULES = Routing(breaker_failures=3, breaker_open_seconds=OPEN_SECONDS)


def failed(times: int, now: float = 0.0) -> Breaker:
    breaker = CLOSED
    for _ in range(times):
        breaker = breaker.failed(now, 3, OPEN_SECONDS)
    return breaker


@pytest.mark.parametrize(
    ("breaker", "now", "state", "resting_seconds"),
    [
        (CLOSED, 9.0, "closed", 0.0),
        (failed(2), 0.0, "closed", 0.0),
        (failed(3), 0.0, "open", 5.0),
        (failed(3), 4.0, "open", 1.0),
        (failed(3), 5.0, "half_open", 0.0),
        (failed(3).asked(5.0), 6.0, "half_open", 4.0),
        (failed(3).asked(5.0), 10.0, "half_open", 0.0),
        (failed(3).asked(5.0).left(), 6.0, "half_open", 0.0),
        (failed(3).asked(5.0).failed(6.0, 3, OPEN_SECONDS), 6.0, "open", 5.0),
        (failed(3).asked(5.0).worked(), 6.0, "closed", 0.0),
        (failed(3).worked(), 1.0, "closed", 0.0),
        (failed(2).worked().failed(0.0, 3, OPEN_SECONDS), 0.0, "closed", 0.0),
        (failed(2).asked(0.0).left(), 0.0, "closed", 0.0),
        (failed(2).left().failed(0.0, 3, OPEN_SECONDS), 0.0, "open", 5.0),
    ],
    ids=[
        "no failure",
        "fewer than it takes",
        "as many in a row",
        "not over yet",
        "over",
        "while it is tried",
        "a trial that takes long",
        "a trial that told nothing",
        "a trial that failed",
        "a trial that worked",
        "an older request that worked",
        "a success in between",
        "a request to a closed one is no trial",
        "what told nothing forgives nothing",
    ],
)
def test_the_state(
    breaker: Breaker, now: float, state: BreakerState, resting_seconds: float
) -> None:
    assert breaker.state(now) == state
    assert breaker.seconds_closed_to_requests(now) == resting_seconds


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (NodeFailed("it broke the connection"), True),
        (NodeTimeout("silence"), True),
        (Relayed(502, "node_failed", "the device process has died"), True),
        (Relayed(500, "node_failed", "a page of HTML"), True),
        (Relayed(400, "node_failed", "an engine's refusal without a code"), False),
        (Relayed(429, "node_failed", "the same"), False),
        (Relayed(503, "node_failed", "the same"), False),
        (Overloaded("full"), False),
        (RateLimitExceeded("later"), False),
        (InvalidRequest("no"), False),
        (InternalError("a bug that this request met"), False),
    ],
    ids=str,
)
def test_what_counts(error: ApiError, *, counts: bool) -> None:
    assert is_failure(error) is counts


class Watch:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def fleet(watch: Watch) -> Fleet:
    """One node, which answers every poll."""
    known = Fleet([Neuron("a", "http://a")], clock=watch)
    known.put(known.node("a").answered(Health(1.0), [], {}, 1.0))
    return known


def shown(fleet: Fleet) -> Node:
    (node,) = fleet.snapshot().nodes
    return node


def test_a_node_that_polls_well_and_breaks_every_request_takes_none(fleet: Fleet) -> None:
    opened = [fleet.broke("a", RULES) for _ in range(4)]

    assert opened == [False, False, True, False]
    assert (shown(fleet).breaker, shown(fleet).takes_requests) == ("open", False)


def test_a_poll_does_not_close_it(fleet: Fleet) -> None:
    for _ in range(3):
        fleet.broke("a", RULES)

    fleet.put(fleet.node("a").answered(Health(1.0), [], {}, 1.0))

    assert not shown(fleet).takes_requests


def test_one_request_at_a_time_tries_it(fleet: Fleet, watch: Watch) -> None:
    for _ in range(3):
        fleet.broke("a", RULES)
    watch.now += OPEN_SECONDS

    before = shown(fleet).takes_requests
    with fleet.holding("a", "m"):
        during = shown(fleet)
        fleet.began("a")
        being_answered = shown(fleet).takes_requests
    fleet.worked("a")

    assert (before, during.takes_requests, being_answered) == (True, False, True)
    assert during.breaker == "half_open"
    assert shown(fleet).breaker == "closed"


def test_a_client_that_leaves_makes_room_for_another_trial(fleet: Fleet, watch: Watch) -> None:
    for _ in range(3):
        fleet.broke("a", RULES)
    watch.now += OPEN_SECONDS

    with fleet.holding("a", "m"):
        pass

    assert (shown(fleet).breaker, shown(fleet).takes_requests) == ("half_open", True)


def test_the_options_are_those_of_the_failure(fleet: Fleet, watch: Watch) -> None:
    fleet.broke("a", Routing(breaker_failures=1, breaker_open_seconds=60.0))

    watch.now += 59.0
    almost = shown(fleet)
    watch.now += 1.0

    assert (almost.breaker, almost.resting_seconds) == ("open", 1.0)
    assert shown(fleet).breaker == "half_open"
