"""The client's side of a stream, started as late as possible.

Until the first byte the status can still tell a failure; from then on an error frame must. A client
that reads nothing for a while is cut off, so that it cannot hold a sequence on a node.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from cortex.gateway.request_id import id_of
from cortex.ipc.node_api import HEADER_NODE, HEADER_REASON
from cortex.ipc.response_body import ResponseBody


class ClientGone(Exception):
    """The client has left, or has stopped reading."""


class ClientStream:
    """One stream of events to one client."""

    def __init__(self, request: web.Request, stalled_seconds: float) -> None:
        self.response: web.StreamResponse | None = None
        self._body: ResponseBody | None = None
        self._request = request
        self._stalled_seconds = stalled_seconds

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return id_of(self._request)

    async def start(self, node: str | None, reason: str) -> None:
        """Send status 200 and the headers, unless that has been done; *node* if it is known."""
        if self.response is not None:
            return
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            HEADER_REASON: reason,
        }
        if node is not None:
            headers[HEADER_NODE] = node
        self.response = web.StreamResponse(headers=headers)
        async with self._patience():
            await self.response.prepare(self._request)
        self._body = ResponseBody(self._request, self.response)

    async def write(self, data: bytes) -> None:
        """Send *data*; raise ClientGone where nobody takes it."""
        assert self._body is not None
        if not self._body.write_at_once(data):
            async with self._patience():
                await self._body.write(data)

    async def finish(self) -> web.StreamResponse:
        """End the response; raise ClientGone where nobody takes the end."""
        assert self.response is not None
        async with self._patience():
            await self.response.write_eof()
        return self.response

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._stalled_seconds):
                yield
        except TimeoutError as exc:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone from exc
        except ConnectionError as exc:
            raise ClientGone from exc
