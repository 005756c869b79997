"""What the client library raises becomes ours."""

import aiohttp
import pytest

from cortex.gateway.fleet import Node
from cortex.gateway.upstream import node_errors
from cortex.ipc.errors import ApiError

NODE = Node("a", "http://a")


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (aiohttp.ConnectionTimeoutError(), "node_failed"),
        (aiohttp.SocketTimeoutError(), "node_timeout"),
        (TimeoutError(), "node_timeout"),
        (aiohttp.ServerDisconnectedError(), "node_failed"),
        (aiohttp.ClientPayloadError(), "node_failed"),
        (aiohttp.ClientConnectionResetError(), "node_failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_names_the_node_and_keeps_its_cause(raised: Exception, code: str) -> None:
    with pytest.raises(ApiError, match="node a ") as caught, node_errors(NODE):
        raise raised

    assert (caught.value.code, caught.value.__cause__) == (code, raised)


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(ZeroDivisionError), node_errors(NODE):
        raise ZeroDivisionError
