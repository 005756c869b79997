"""One inference request, from the client's call to the last byte of its answer.

    ready replica? -> ask the node -> first byte -> stream or answer
         |                |               |
     keep-alives     another replica   an error frame in the dialect, no [DONE]

A node that breaks, or says that it cannot now, is forgiven as long as none of its bytes has gone to
the client: the next replica is asked (``attempts.py``). A client that goes away cancels this task,
and with it the request at the node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager

import structlog
from aiohttp import web

from cortex.gateway import sse
from cortex.gateway.affinity import session_of
from cortex.gateway.attempts import Attempts
from cortex.gateway.auth import principal_of
from cortex.gateway.background import Background
from cortex.gateway.budgets import Budgets
from cortex.gateway.circuit_breaker import is_failure
from cortex.gateway.client_stream import ClientGone, ClientStream
from cortex.gateway.demands import Demand
from cortex.gateway.dialects.dialect import Call, Translation
from cortex.gateway.door import Door
from cortex.gateway.engine_asking import EngineAnswer, ask_engine
from cortex.gateway.engine_tokens import count_tokens_at
from cortex.gateway.errors import BUG, dialect_of
from cortex.gateway.exchange import Exchange
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.ledger import Ledger
from cortex.gateway.lifecycle import Lifecycle
from cortex.gateway.metrics import Metrics
from cortex.gateway.poller import Poller
from cortex.gateway.renaming import Renaming
from cortex.gateway.routing import NOBODY, Serve, choose
from cortex.gateway.upstream import NodeAnswer, NodeClient
from cortex.gateway.usage import RequestRecord, cause_of
from cortex.gateway.written import Written
from cortex.ipc.errors import ApiError, InternalError, NodeFailed
from cortex.ipc.http_body import LARGE_BYTES, decoded, read_body
from cortex.ipc.node_api import HEADER_REQUEST_ID

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
OUTCOMES = {"session-home": "home", "session-moved": "moved"}
"""Of sessions that had a choice, by the reason of the choice."""

log = structlog.get_logger()


class Proxy:
    """Serves inference requests."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        poller: Poller,
        lifecycle: Lifecycle,
        client: NodeClient,
        metrics: Metrics,
        door: Door,
        written: Written,
        budgets: Budgets,
        ledger: Ledger,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._lifecycle = lifecycle
        self._client = client
        self._metrics = metrics
        self._door = door
        self._written = written
        self._budgets = budgets
        self._ledger = ledger

    async def serve(
        self,
        request: web.Request,
        decode: Callable[[bytes], Call],
        large_bytes: int = LARGE_BYTES,
    ) -> web.StreamResponse:
        """Return the answer to the call that *decode* finds in the body.

        From *large_bytes* on it looks in a thread. Raise ApiError while the status can still tell.
        """
        principal, dialect = principal_of(request), dialect_of(request)
        client = ClientStream(request, self._written.timeouts.client_stalled_seconds)
        record = RequestRecord(request.path, principal.key_id)
        exchange: Exchange | None = None
        try:
            async with self._door.enter():
                body = await read_body(request, self._written.timeouts.client_stalled_seconds)
                call = await decoded(body, decode, large_bytes)
                exchange = self._exchange(request, call, client, record)
                with Renaming(exchange.target.node_id, call.model).errors():
                    return await self._with_retries(exchange)
        except ApiError as error:
            record.failed(error, dialect.status(error))
            if exchange is None:
                raise
            return await exchange.end_with(error)
        except ClientGone:
            record.client_gone()
            return client.response or web.Response()
        except asyncio.CancelledError:
            record.client_gone()
            raise
        except Exception:
            bug = InternalError(BUG)
            record.failed(bug, bug.status)
            if exchange is None:
                raise
            log.exception("request failed")
            return await exchange.end_with(bug)
        finally:
            record.close(self._metrics, self._ledger)

    def _exchange(
        self, request: web.Request, call: Call, client: ClientStream, record: RequestRecord
    ) -> Exchange:
        """Return what *call* needs; raise ModelNotAllowed where its caller may not have it."""
        principal, written = principal_of(request), self._written
        target = written.catalogue.target(call.model)
        principal.check_may_use(target.id, written.catalogue)
        factor = written.config.routing.affinity_load_factor
        return Exchange(
            call=call,
            target=target,
            principal=principal,
            session=session_of(principal.key_id, request.headers, call.affinity, factor),
            request_id=client.request_id,
            client=client,
            record=record,
            attempts=Attempts(call.wants_stream),
        )

    async def _with_retries(self, exchange: Exchange) -> web.StreamResponse:
        if exchange.target.profile:
            exchange.record.model = exchange.target.id
        self._reserve(exchange)
        replica = await self._ready(exchange)
        while True:
            try:
                return await self._ask(exchange, replica)
            except ApiError as error:
                self._judge(error, replica)
                if exchange.has_answer:
                    raise
                exchange.record.node_failed()
                following = await self._after(error, replica, exchange)
                if following is None:
                    last = exchange.attempts.answer()
                    exchange.replica, exchange.record.node = last.replica, last.replica.node.name
                    raise last.error from None
                where = (exchange.record.model, replica.node.name)
                self._metrics.retries.labels(*where, cause_of(error.code)).inc()
                log.info("request retried", node=replica.node.name, code=error.code)
                replica = following

    def _reserve(self, exchange: Exchange) -> None:
        """Take a place among the requests of its key; raise where its limits leave none."""
        exchange.record.reservation = self._budgets.reserve(
            exchange.principal, exchange.call, exchange.target
        )

    async def _ready(self, exchange: Exchange, excluded: AbstractSet[str] = NOBODY) -> Serve:
        """Return a replica, keeping the stream alive while the model loads."""

        async def heartbeat(load: Demand) -> None:
            if exchange.call.wants_stream:
                node = load.node.name if load.node else None
                await exchange.client.start(node, "loaded-on-demand")
                await exchange.client.write(exchange.call.keep_alive(load.describe()))

        serve = await self._lifecycle.ready(
            exchange.target,
            excluded=excluded,
            heartbeat=heartbeat,
            session=exchange.session,
            patience_seconds=self._patience_seconds(exchange.call),
        )
        # Somebody serves it: only a name that means something may become a label.
        exchange.record.model = exchange.target.id
        return serve

    def _patience_seconds(self, call: Call) -> float | None:
        """Return what *call* waits for a load: a stream is kept alive, and waits on."""
        return None if call.wants_stream else self._written.timeouts.load_wait_seconds

    async def _after(self, error: ApiError, replica: Serve, exchange: Exchange) -> Serve | None:
        """Return where to go on after *error* of *replica*; None: the client gets an error."""
        attempts, node_id = exchange.attempts, exchange.target.node_id
        match attempts.after(replica, error):
            case "look again":
                await self._poller.refresh(replica.node.name)
                return await self._ready(exchange)
            case "another":
                excluded = attempts.tried | self._lifecycle.closed(node_id)
                left = choose(self._fleet.snapshot(), node_id, excluded, exchange.session)
                if left is None and attempts.has_reached_nobody:
                    return await self._ready(exchange, attempts.tried)
                return Serve(left.node, "retried") if left else None
            case "answer":
                return None

    def _judge(self, error: ApiError, replica: Serve) -> None:
        """Draw from *error* what it says about the node."""
        name = replica.node.name
        if error.code in DOUBTFUL:
            self._poller.doubt(name)
        if is_failure(error) and self._fleet.broke(name, self._written.config.routing):
            log.warning("node closed to requests", node=name, code=error.code, why=str(error))

    async def _ask(self, exchange: Exchange, replica: Serve) -> web.StreamResponse:
        node, call, node_id = replica.node, exchange.call, exchange.target.node_id
        self._note(exchange, replica)

        async def count(body: bytes) -> int:
            headers = {HEADER_REQUEST_ID: exchange.request_id}
            return await count_tokens_at(self._client, node, body, headers)

        body = call.body(node_id)
        exchange.record.body_bytes = len(body)
        request = self._request(exchange, node, body)
        with self._fleet.holding(node.name, node_id):
            self._fleet.stay((node.name, node_id), call.stay_seconds)
            if not call.wants_stream:
                async with request as answer:
                    return await self._whole(exchange, replica, answer)
            async with Background() as beside:
                translation = beside.task(call.translation(node_id, count), "translation")
                if node.is_engine:  # it may end what it answers for what it is asked next
                    await translation
                async with request as answer:
                    return await self._stream(exchange, replica, answer, translation)

    def _request(
        self, exchange: Exchange, node: Node, body: bytes
    ) -> AbstractAsyncContextManager[NodeAnswer | EngineAnswer]:
        if node.is_engine:
            patience = self._written.timeouts.keep_alive_seconds
            return ask_engine(self._client, node, exchange.call, body, patience)
        return self._client.ask(node, exchange.call.path, body, exchange.headers())

    def _note(self, exchange: Exchange, replica: Serve) -> None:
        """Note that *replica* is asked now, and why."""
        record = exchange.record
        exchange.replica = replica
        record.asked(replica.node.name, replica.reason)
        if outcome := OUTCOMES.get(replica.reason):
            self._metrics.affinity.labels(record.model, outcome).inc()

    async def _whole(
        self, exchange: Exchange, replica: Serve, answer: NodeAnswer | EngineAnswer
    ) -> web.StreamResponse:
        body = await answer.read()

        def taken(body: bytes) -> bytes:
            exchange.record.meter.saw_answer(body)
            return exchange.call.answer(exchange.target.node_id, body)

        told = await decoded(body, taken)  # embeddings may have tens of megabytes
        self._fleet.worked(replica.node.name)
        return web.Response(body=told, content_type="application/json", headers=replica.headers())

    async def _stream(
        self,
        exchange: Exchange,
        replica: Serve,
        answer: NodeAnswer | EngineAnswer,
        translating: asyncio.Task[Translation],
    ) -> web.StreamResponse:
        meter, client = exchange.record.meter, exchange.client
        chunk = await self._first_chunk(exchange, replica, answer)
        if not chunk:
            raise NodeFailed(f"node {answer.node.name} ended its answer before it began")
        self._fleet.began(replica.node.name)
        translation = await translating
        await client.start(replica.node.name, replica.reason)
        exchange.has_answer = True
        while chunk:
            meter.saw(chunk)
            if sse.ERROR in chunk:  # before the client can act on it
                self._poller.doubt(replica.node.name)
            if said := translation.feed(chunk):
                await client.write(said)
            if translation.error:
                raise translation.error
            chunk = await answer.next_chunk()
        meter.ended()
        if meter.error:
            # The node has said it in its last frame, and the client has got that.
            self._judge(meter.error, replica)
            exchange.record.failed(meter.error, meter.error.status)
        elif not meter.is_complete:
            raise NodeFailed(f"node {answer.node.name} ended its answer too early")
        else:
            self._fleet.worked(replica.node.name)
        return await client.finish()

    async def _first_chunk(
        self, exchange: Exchange, replica: Serve, answer: NodeAnswer | EngineAnswer
    ) -> bytes:
        """Return the first chunk; until an engine begins the client's stream is kept alive.

        Its status is spent then, and another replica may still answer.
        """
        while (chunk := await answer.next_chunk()) == sse.KEEP_ALIVE:
            await exchange.client.start(replica.node.name, replica.reason)
            words = f"waiting for {replica.node.name}"
            await exchange.client.write(exchange.call.keep_alive(words))
        return chunk
