"""One inference request, from the client's call to the last byte of its answer.

    ready replica? -> ask the node -> first byte -> stream or answer
         |                |               |
     keep-alives     another replica   an error frame in the dialect, no [DONE]

A node that breaks, or says that it cannot now, is forgiven as long as none of its bytes has gone to
the client: the next replica is asked. A client that goes away cancels this task, and with it the
request at the node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from aiohttp import web

from cortex.gateway import sse
from cortex.gateway.auth import Principal, principal_of
from cortex.gateway.background import Background
from cortex.gateway.catalogue import Catalogue, Target
from cortex.gateway.client_stream import ClientGone, ClientStream
from cortex.gateway.config import Timeouts
from cortex.gateway.dialects.dialect import Call, Translation
from cortex.gateway.door import Door
from cortex.gateway.errors import BUG, dialect_of
from cortex.gateway.fleet import Fleet
from cortex.gateway.lifecycle import Lifecycle, RunningLoad
from cortex.gateway.metrics import Metrics
from cortex.gateway.poller import Poller
from cortex.gateway.renaming import Renaming
from cortex.gateway.request_id import id_of
from cortex.gateway.routing import Serve, replicas
from cortex.gateway.upstream import NodeAnswer, NodeClient
from cortex.gateway.usage import RequestRecord
from cortex.ipc.errors import ApiError, InternalError, NodeFailed
from cortex.ipc.http_body import decoded, read_body
from cortex.ipc.node_api import (
    HEADER_KEY,
    HEADER_NODE,
    HEADER_REASON,
    HEADER_REQUEST_ID,
    HEADER_USAGE,
)

DOUBTFUL = frozenset(
    {
        "model_loading",
        "model_not_found",
        "node_failed",
        "node_timeout",
        "recovering",
        "shutting_down",
    }
)
"""Codes that a node which was asked should not have given, by what we know of it."""
STALE = frozenset({"model_loading", "model_not_found"})
"""Those after which the model may have to be waited for, or loaded."""

log = structlog.get_logger()


@dataclass
class Exchange:
    """What one request needs to remember while it is served."""

    call: Call
    target: Target
    principal: Principal
    request_id: str
    client: ClientStream
    record: RequestRecord
    tried: set[str] = field(default_factory=set)
    has_answer: bool = False
    """Whether a byte of a node's answer has gone to the client; then there is no second try."""
    has_looked_again: bool = False

    def headers(self) -> dict[str, str]:
        """Return the headers for a node."""
        headers = {HEADER_REQUEST_ID: self.request_id, HEADER_USAGE: "1"}
        if self.principal.key_id:
            headers[HEADER_KEY] = self.principal.key_id
        return headers


class Proxy:
    """Serves inference requests."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        poller: Poller,
        lifecycle: Lifecycle,
        client: NodeClient,
        catalogue: Catalogue,
        metrics: Metrics,
        door: Door,
        timeouts: Timeouts,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._lifecycle = lifecycle
        self._client = client
        self._catalogue = catalogue
        self._metrics = metrics
        self._door = door
        self._timeouts = timeouts

    async def serve(
        self, request: web.Request, decode: Callable[[bytes], Call]
    ) -> web.StreamResponse:
        """Return the answer to the call that *decode* finds in the body.

        Raise ApiError while the status can still tell it.
        """
        principal, dialect = principal_of(request), dialect_of(request)
        client = ClientStream(request, self._timeouts.client_stalled_seconds)
        record = RequestRecord(request.path, principal.key_id)
        try:
            async with self._door.enter():
                body = await read_body(request, self._timeouts.client_stalled_seconds)
                call = await decoded(body, decode)
                target = self._catalogue.target(call.model)
                principal.check_may_use(target.id, self._catalogue)
                exchange = Exchange(call, target, principal, id_of(request), client, record)
                with Renaming(target.node_id, call.model).errors():
                    return await self._with_retries(exchange)
        except ApiError as error:
            record.failed(error, dialect.status(error))
            if not client.is_started:
                raise
            return await self._end_with(dialect.error_frame(error, id_of(request)), client)
        except ClientGone:
            record.client_gone()
            return client.response or web.Response()
        except asyncio.CancelledError:
            record.client_gone()
            raise
        except Exception:
            bug = InternalError(BUG)
            record.failed(bug, bug.status)
            if not client.is_started:
                raise
            log.exception("request failed")
            return await self._end_with(dialect.error_frame(bug, id_of(request)), client)
        finally:
            record.close(self._metrics)

    async def _end_with(self, frame: bytes, client: ClientStream) -> web.StreamResponse:
        """End a stream whose status is spent with an error *frame*."""
        assert client.response is not None
        try:
            await client.write(frame)
            return await client.finish()
        except ClientGone:
            return client.response

    async def _with_retries(self, exchange: Exchange) -> web.StreamResponse:
        if exchange.target.profile:
            exchange.record.model = exchange.target.id
        replica = await self._ready(exchange)
        while True:
            try:
                return await self._ask(exchange, replica)
            except ApiError as error:
                self._doubt(error, replica)
                exchange.tried.add(replica.node.name)
                following = await self._after(error, exchange)
                if following is None:
                    raise
                log.info("request retried", node=replica.node.name, code=error.code)
                replica = following

    async def _ready(self, exchange: Exchange) -> Serve:
        """Return a replica, keeping the stream alive while the model loads."""

        async def heartbeat(load: RunningLoad) -> None:
            if exchange.call.wants_stream:
                await exchange.client.start(load.node.name, "loaded-on-demand")
                await exchange.client.write(exchange.call.dialect.keep_alive(load.describe()))

        serve = await self._lifecycle.ready(exchange.target, heartbeat=heartbeat)
        # Somebody serves it: only a name that means something may become a label.
        exchange.record.model = exchange.target.id
        return serve

    async def _after(self, error: ApiError, exchange: Exchange) -> Serve | None:
        """Return where to go on after *error*, or None where it is the client's answer."""
        if exchange.has_answer:
            return None
        if error.code in STALE and not exchange.has_looked_again:
            # Unloaded since the last poll, say: look again, and load it if it has to be.
            exchange.has_looked_again = True
            await self._poller.refresh(exchange.record.node)
            return await self._ready(exchange)
        if error.status in (502, 503):
            left = replicas(self._fleet.snapshot(), exchange.target.node_id, exchange.tried)
            return Serve(left[0], "retried") if left else None
        return None

    def _doubt(self, error: ApiError, replica: Serve) -> None:
        if error.code in DOUBTFUL:
            self._poller.doubt(replica.node.name)

    async def _ask(self, exchange: Exchange, replica: Serve) -> web.StreamResponse:
        node, call, node_id = replica.node, exchange.call, exchange.target.node_id
        exchange.record.node = node.name

        async def control(path: str, body: bytes) -> bytes:
            headers = {HEADER_REQUEST_ID: exchange.request_id}
            return await self._client.control(node, f"POST {path}", body, headers)

        request = self._client.ask(node, call.path, call.body(node_id), exchange.headers())
        with self._fleet.holding(node.name, node_id):
            if not call.wants_stream:
                async with request as answer:
                    return await self._whole(exchange, replica, answer)
            async with Background() as beside:
                translation = beside.task(call.translation(node_id, control), "translation")
                async with request as answer:
                    return await self._stream(exchange, replica, answer, translation)

    async def _whole(
        self, exchange: Exchange, replica: Serve, answer: NodeAnswer
    ) -> web.StreamResponse:
        body = await answer.read()

        def taken(body: bytes) -> bytes:
            exchange.record.meter.saw_answer(body)
            return exchange.call.answer(exchange.target.node_id, body)

        return web.Response(
            body=await decoded(body, taken),  # embeddings may have tens of megabytes
            content_type="application/json",
            headers={HEADER_NODE: replica.node.name, HEADER_REASON: replica.reason},
        )

    async def _stream(
        self,
        exchange: Exchange,
        replica: Serve,
        answer: NodeAnswer,
        translating: asyncio.Task[Translation],
    ) -> web.StreamResponse:
        meter, client = exchange.record.meter, exchange.client
        chunk = await answer.next_chunk()
        if not chunk:
            raise NodeFailed(f"node {answer.node.name} ended its answer before it began")
        translation = await translating
        await client.start(replica.node.name, replica.reason)
        exchange.has_answer = True
        while chunk:
            meter.saw(chunk)
            if sse.ERROR in chunk:  # before the client can act on it
                self._poller.doubt(replica.node.name)
            if said := translation.feed(chunk):
                await client.write(said)
            chunk = await answer.next_chunk()
        meter.ended()
        if meter.error:
            # The node has said it in its last frame, and the client has got that.
            self._doubt(meter.error, replica)
            exchange.record.failed(meter.error, meter.error.status)
        elif not meter.is_complete:
            raise NodeFailed(f"node {answer.node.name} ended its answer too early")
        return await client.finish()
