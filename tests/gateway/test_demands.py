"""What is said of a model that is waited for."""

import pytest

from cortex.gateway.catalogue import Target
from cortex.gateway.demands import BACK_OFF_SECONDS, Demand, Failures
from cortex.ipc.errors import NodeFailed
from cortex.ipc.node_api import Progress
from memory_fleet import a_node


def a_demand(progress: Progress | None = None, waiting: int = 1) -> Demand:
    demand = Demand(Target("m", "m", None), 0.0)
    demand.node, demand.progress, demand.waiting = a_node("a"), progress, waiting
    return demand


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (None, "loading m on a"),
        (Progress("queued"), "loading m on a: queued"),
        (Progress("downloading", 1, 3), "loading m on a: downloading 33%"),
        (Progress("loading", 1, 2, 8.4), "loading m on a: loading 50%, 8 s left"),
        (Progress("loading", eta_seconds=0.1), "loading m on a: loading, 1 s left"),
    ],
)
def test_progress_is_said_in_words(progress: Progress | None, words: str) -> None:
    assert a_demand(progress).describe() == words


def test_how_many_wait_is_said_where_it_is_more_than_one() -> None:
    assert a_demand(waiting=3).describe() == "loading m on a; 3 requests wait"


def test_what_it_waits_for_is_said_while_it_has_no_node() -> None:
    demand = a_demand()
    demand.node, demand.why = None, "waiting for x to finish on a"

    assert demand.describe() == "loading m: waiting for x to finish on a"


@pytest.mark.parametrize(
    ("eta_seconds", "retry_after"), [(None, 5), (0.2, 1), (42.4, 42), (4000.0, 60)]
)
def test_who_waits_no_longer_is_told_when_to_come_back(
    eta_seconds: float | None, retry_after: int
) -> None:
    error = a_demand(Progress("loading", eta_seconds=eta_seconds)).later()

    assert (error.code, error.retry_after_seconds) == ("model_loading", retry_after)
    assert error.extras.get("eta_seconds") == eta_seconds
    assert error.extras["progress"] == str(error)


def test_a_failure_is_remembered_for_some_seconds() -> None:
    failures = Failures()
    failures.note("m", NodeFailed("the disk is full"), now=10.0)

    with pytest.raises(NodeFailed, match="the disk is full"):
        failures.refuse("m", now=10.0 + BACK_OFF_SECONDS - 0.1)
    failures.refuse("other", now=10.0)
    failures.refuse("m", now=10.0 + BACK_OFF_SECONDS)
    failures.refuse("m", now=10.0)  # forgotten
