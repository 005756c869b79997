"""What follows when a node has failed a request, row by row."""

import pytest

from cortex.gateway.attempts import MAX_ATTEMPTS, Attempts, Step
from cortex.gateway.errors import Relayed
from cortex.gateway.fleet import Node
from cortex.gateway.routing import Serve
from cortex.gateway.upstream import Unreachable
from cortex.ipc.errors import (
    ApiError,
    ContextLengthExceeded,
    InternalError,
    ModelLoading,
    ModelNotFound,
    NodeFailed,
    NodeTimeout,
    Overloaded,
    RateLimitExceeded,
    Recovering,
    ShuttingDown,
)


def replica(name: str) -> Serve:
    return Serve(Node(name, f"http://{name}"), "least-loaded")


def after(*errors: ApiError, wants_stream: bool = True) -> tuple[Step, Attempts]:
    """Return what follows the last of *errors*, each of another node: a, b, ..."""
    attempts, step = Attempts(wants_stream), None
    for name, error in zip("abcdefghijkl", errors, strict=False):
        step = attempts.after(replica(name), error)
    assert step is not None
    return step, attempts


@pytest.mark.parametrize(
    ("errors", "step"),
    [
        ([Overloaded("full")], "another"),
        ([RateLimitExceeded("an engine's")], "another"),
        ([Recovering("soon"), ShuttingDown("bye"), Overloaded("full")], "another"),
        ([NodeFailed("broke")], "another"),
        ([Relayed(500, "node_failed", "a page of HTML")], "another"),
        ([NodeFailed("broke"), NodeFailed("broke")], "answer"),
        ([NodeFailed("broke"), Overloaded("full")], "another"),
        ([Unreachable("refused")] * 4, "another"),
        ([NodeTimeout("silence")], "another"),
        ([ModelNotFound("unloaded")], "look again"),
        ([ModelLoading("on its way")], "look again"),
        ([ModelNotFound("unloaded"), ModelNotFound("unloaded")], "answer"),
        ([ModelNotFound("unloaded"), ModelLoading("on its way")], "another"),
        ([ContextLengthExceeded.of(9, 8)], "answer"),
        ([InternalError("a bug")], "answer"),
        ([Overloaded("full")] * (MAX_ATTEMPTS - 1), "another"),
        ([Overloaded("full")] * MAX_ATTEMPTS, "answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(e.code for e in value),
)
def test_what_follows(errors: list[ApiError], step: Step) -> None:
    assert after(*errors)[0] == step


def test_a_whole_answer_that_takes_too_long_is_not_computed_again_elsewhere() -> None:
    assert after(NodeTimeout("silence"), wants_stream=False)[0] == "answer"


def test_every_node_that_was_asked_is_known() -> None:
    _, attempts = after(Overloaded("full"), NodeFailed("broke"))

    assert attempts.tried == {"a", "b"}


@pytest.mark.parametrize(
    ("errors", "answers"),
    [
        ([Overloaded("full"), NodeFailed("broke")], "a"),
        ([NodeFailed("broke"), Overloaded("full")], "b"),
        ([Overloaded("1", retry_after_seconds=9), Overloaded("2", retry_after_seconds=3)], "b"),
        ([Overloaded("1", retry_after_seconds=3), Overloaded("2", retry_after_seconds=9)], "a"),
        ([Overloaded("1", retry_after_seconds=3), Overloaded("2")], "a"),
        ([Unreachable("1"), NodeFailed("2")], "b"),
        ([Overloaded("1", retry_after_seconds=3), ContextLengthExceeded.of(9, 8)], "b"),
        ([ModelNotFound("1"), Overloaded("2")], "b"),
    ],
)
def test_the_client_gets_the_most_useful_answer(errors: list[ApiError], answers: str) -> None:
    _, attempts = after(*errors)

    assert attempts.answer().replica.node.name == answers
