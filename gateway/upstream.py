"""The one place that speaks HTTP to nodes.

Everything foreign becomes ours here: a refusal of the node is raised as Relayed, a connection that
breaks as NodeFailed, silence as NodeTimeout. Nothing a client sent goes to a node but the body:
headers are made anew, so that no credential and no ``x-cortex-`` header of a client can pass; the
node's own key goes instead (``credentials.py``).
"""

from __future__ import annotations

import io
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import aiohttp
import orjson

from cortex.gateway.config import Timeouts
from cortex.gateway.credentials import Credentials
from cortex.gateway.errors import Relayed, reason_of
from cortex.gateway.fleet import Node
from cortex.ipc.errors import ApiError, NodeFailed, NodeTimeout

LIMIT_OF_A_REFUSAL_BYTES = 64 * 1024
LARGE_BODY_BYTES = 2**20


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
        with node_errors(self.node):
            return await self._response.content.readany()

    async def read(self) -> bytes:
        """Return the whole body; raise NodeFailed or NodeTimeout."""
        with node_errors(self.node):
            return await self._response.read()


class NodeClient:
    """Connections to all nodes, pooled; an async context manager."""

    def __init__(self, timeouts: Timeouts, credentials: Credentials) -> None:
        self._timeouts = timeouts
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
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
            sock_connect=self._timeouts.connect_seconds,
            sock_read=self._timeouts.between_bytes_seconds,
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
            total=self._timeouts.control_seconds, sock_connect=self._timeouts.connect_seconds
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
        credential = self._credentials.of(node.name)
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
                raise await _refusal(node, response)
            yield response
        finally:
            response.close()


async def _refusal(node: Node, response: aiohttp.ClientResponse) -> ApiError:
    if response.status < 400:
        return NodeFailed(f"node {node.name} answered with status {response.status}")
    if response.status == 401:  # of ours, not of the client's key
        return NodeFailed(f"node {node.name} wants another key: set key_file of this neuron")
    body = b""
    with node_errors(node):
        while left := LIMIT_OF_A_REFUSAL_BYTES - len(body):
            piece = await response.content.read(left)
            if not piece:
                break
            body += piece
    return Relayed.of(
        response.status,
        _error_object(body),
        response.headers.get("Retry-After"),
        otherwise=f"node {node.name} answered with status {response.status} and no reason",
    )


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
    except aiohttp.ConnectionTimeoutError as exc:
        raise NodeFailed(f"node {node.name} accepts no connection") from exc
    except (TimeoutError, aiohttp.ServerTimeoutError) as exc:
        raise NodeTimeout(f"node {node.name} did not answer in time") from exc
    except aiohttp.ClientConnectorCertificateError as exc:
        why = certificate_words(exc.certificate_error)
        raise NodeFailed(
            f"node {node.name} shows a certificate that is not trusted: {why}"
        ) from exc
    except aiohttp.ClientConnectorSSLError as exc:
        why = (exc.os_error.reason or "no reason").lower().replace("_", " ")
        raise NodeFailed(f"node {node.name} cannot be spoken to over TLS ({why})") from exc
    except aiohttp.ClientConnectorError as exc:
        raise NodeFailed(f"node {node.name} cannot be reached ({reason_of(exc.os_error)})") from exc
    except aiohttp.ClientError as exc:
        raise NodeFailed(f"node {node.name} broke the connection") from exc


def certificate_words(error: Exception) -> str:
    """Return what OpenSSL finds wrong with a certificate, which its text hides in codes."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    return str(error)
