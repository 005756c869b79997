"""What the client library raises becomes ours."""

import errno
import socket
import sys

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from cortex.gateway.fleet import Node
from cortex.gateway.upstream import GONE_SECONDS, _watchful_socket, node_errors
from cortex.ipc.errors import ApiError, NodeFailed

NODE = Node("a", "http://a")


@pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")
def test_a_host_that_is_cut_off_is_found_out_while_a_request_waits_for_its_answer() -> None:
    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))

    with _watchful_socket(address) as made:
        option = made.getsockopt

        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < GONE_SECONDS
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == GONE_SECONDS * 1000


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ECONNREFUSED, "Connect call failed ('10.0.0.1', 1)"), "connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (OSError("Multiple exceptions"), "multiple exceptions"),
    ],
)
def test_a_node_that_is_not_there_did_not_break_anything(error: OSError, reason: str) -> None:
    key = ConnectionKey("a", 1, False, True, None, None, None)

    with pytest.raises(NodeFailed) as caught, node_errors(NODE):
        raise aiohttp.ClientConnectorError(key, error)

    assert str(caught.value) == f"node a cannot be reached ({reason})"


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(ZeroDivisionError), node_errors(NODE):
        raise ZeroDivisionError
