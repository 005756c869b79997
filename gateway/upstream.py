"""The one place that speaks HTTP to nodes.

Everything foreign becomes ours here: a refusal of the node is raised as Relayed, a connection that
breaks as NodeFailed, silence as NodeTimeout. Nothing a client sent goes to a node but the body:
headers are made anew, so that no credential and no ``x-cortex-`` header of a client can pass; the
node's own key goes instead (``credentials.py``).
"""

from __future__ import annotations

import io
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import aiohttp
import orjson
from aiohttp.connector import AddrInfoType

from cortex.gateway.credentials import Credentials
from cortex.gateway.engine_errors import refusal as engine_refusal
from cortex.gateway.errors import Relayed, reason_of
from cortex.gateway.fleet import Node
from cortex.gateway.written import Written
from cortex.ipc.errors import ApiError, NodeFailed, NodeTimeout

LIMIT_OF_A_REFUSAL_BYTES = 64 * 1024
LARGE_BODY_BYTES = 2**20
GONE_SECONDS = 12
"""After which a host that acknowledges nothing is taken for gone, whatever a request waits for."""
FOREIGN = (TimeoutError, aiohttp.ClientError)
"""What the client library raises."""


class Unreachable(NodeFailed):
    """The node has not got the request: no connection came about."""


class NodeAnswer:
    """The answer of a node whose status is 200: its body, in pieces as they come or whole."""

    def __init__(self, node: Node, response: aiohttp.ClientResponse) -> None:
        self.node = node
        self.content_type = response.headers.get("Content-Type", "application/json")
        self._response = response

    async def next_chunk(self) -> bytes:
        """Return what has come, as soon as anything has; nothing at the end.

        Raise NodeFailed or NodeTimeout.
        """
        try:  # not ``node_errors``, which takes a microsecond for each token of each stream
            return await self._response.content.readany()
        except FOREIGN as exc:
            raise node_error(self.node, exc) from exc

    async def read(self) -> bytes:
        """Return the whole body; raise NodeFailed or NodeTimeout."""
        with node_errors(self.node):
            return await self._response.read()


class NodeClient:
    """Connections to all nodes, pooled; an async context manager."""

    def __init__(self, written: Written, credentials: Credentials) -> None:
        self._written = written
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=30, socket_factory=_watchful_socket
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "cortex"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    @asynccontextmanager
    async def ask(
        self, node: Node, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[NodeAnswer]:
        """POST *body*; leaving the block early cancels the request at the node.

        Raise Relayed where the node refuses, NodeFailed and NodeTimeout.
        """
        limits = aiohttp.ClientTimeout(
            total=None,
            sock_connect=self._written.timeouts.connect_seconds,
            sock_read=self._written.timeouts.between_bytes_seconds,
        )
        async with self._request(node, f"POST {path}", body, headers, limits) as response:
            yield NodeAnswer(node, response)

    async def control(
        self,
        node: Node,
        route: str,
        payload: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Return the body of a short call, ``GET /health`` say.

        Raise Relayed, NodeFailed and NodeTimeout.
        """
        limits = aiohttp.ClientTimeout(
            total=self._written.timeouts.control_seconds,
            sock_connect=self._written.timeouts.connect_seconds,
        )
        async with self._request(node, route, payload, headers or {}, limits) as response:
            with node_errors(node):
                return await response.read()

    @asynccontextmanager
    async def _request(
        self,
        node: Node,
        route: str,
        body: bytes | None,
        headers: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        method, path = route.split(" ", 1)
        # aiohttp wants large bodies as files, which it sends in pieces.
        data = io.BytesIO(body) if body and len(body) > LARGE_BODY_BYTES else body
        credential = self._credentials.of(node.url)
        if credential is None:
            raise NodeFailed(f"node {node.name} is no longer configured")
        sent = {**headers, **credential.headers}
        if body is not None:
            sent["Content-Type"] = "application/json"
        with node_errors(node):
            response = await self._session.request(
                method,
                node.url + path,
                data=data,
                headers=sent,
                timeout=limits,
                ssl=credential.context,
                allow_redirects=False,  # a prompt goes to nobody but the node
            )
        try:
            if response.status not in (200, 202):
                raise await _refusal(node, path, response)
            yield response
        finally:
            response.close()


def _watchful_socket(address: AddrInfoType) -> socket.socket:
    """Return a socket that breaks where the other host is gone without a word.

    Between two bytes a node may compute for minutes; its kernel answers all the same.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE_SECONDS // 2)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, GONE_SECONDS // 4)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_SECONDS * 1000)
    return made


async def _refusal(node: Node, path: str, response: aiohttp.ClientResponse) -> ApiError:
    if response.status < 400:
        return NodeFailed(f"node {node.name} answered with status {response.status}")
    retry_after = response.headers.get("Retry-After")
    if node.is_engine:
        body = await _said(node, response)
        return engine_refusal(node.name, response.status, body, path=path, retry_after=retry_after)
    if response.status == 401:  # of ours, not of the client's key
        return NodeFailed(f"node {node.name} wants another key: set key_file of this neuron")
    return Relayed.of(
        response.status,
        _error_object(await _said(node, response)),
        retry_after,
        otherwise=f"node {node.name} answered with status {response.status} and no reason",
    )


async def _said(node: Node, response: aiohttp.ClientResponse) -> bytes:
    """Return the body of a refusal, or as much of it as is read."""
    body = b""
    with node_errors(node):
        while left := LIMIT_OF_A_REFUSAL_BYTES - len(body):
            piece = await response.content.read(left)
            if not piece:
                break
            body += piece
    return body


def _error_object(body: bytes) -> dict[str, Any]:
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {"message": str(error)}


@contextmanager
def node_errors(node: Node) -> Iterator[None]:
    """Turn what the client library raises into our errors."""
    try:
        yield
    except FOREIGN as exc:
        raise node_error(node, exc) from exc


def node_error(node: Node, exc: Exception) -> NodeFailed | NodeTimeout:
    """Return what *exc*, one of FOREIGN, means."""
    match exc:
        case aiohttp.ConnectionTimeoutError():
            return Unreachable(f"node {node.name} accepts no connection")
        case TimeoutError():
            return NodeTimeout(f"node {node.name} did not answer in time")
        case aiohttp.ClientConnectorCertificateError():
            why = certificate_words(exc.certificate_error)
            return Unreachable(f"node {node.name} shows a certificate that is not trusted: {why}")
        case aiohttp.ClientConnectorSSLError():
            why = (exc.os_error.reason or "no reason").lower().replace("_", " ")
            return Unreachable(f"node {node.name} cannot be spoken to over TLS ({why})")
        case aiohttp.ClientConnectorError():
            return Unreachable(f"node {node.name} cannot be reached ({reason_of(exc.os_error)})")
        case _:
            return NodeFailed(f"node {node.name} broke the connection")


def certificate_words(error: Exception) -> str:
    """Return what OpenSSL finds wrong with a certificate, which its text hides in codes."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    return str(error)
