"""Lets inference in until the neuron drains; every request that came leaves one line behind.

However a request ends, it is logged, measured and published once, with what was known of it then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import structlog
from aiohttp import web

from cortex.ipc.errors import ApiError
from cortex.ipc.http_body import read_body
from cortex.ipc.taps import Tap
from cortex.runtime.access import CALLER
from cortex.runtime.admission import shutting_down
from cortex.runtime.metrics import Metrics
from cortex.runtime.middlewares import REQUEST_ID, as_api_error
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.traffic import Traffics

log = structlog.get_logger()


class Door:
    """Open until ``close``; ``empty`` waits for those inside."""

    def __init__(
        self,
        traffics: Traffics,
        metrics: Metrics,
        tap: Tap,
        *,
        clock: Callable[[], float],
        body_patience_seconds: float,
    ) -> None:
        self.is_closed = False
        self._traffics = traffics
        self._metrics = metrics
        self._tap = tap
        self._clock = clock
        self._body_patience_seconds = body_patience_seconds
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def close(self) -> None:
        """Answer 503 ``shutting_down`` from now on, also to who waits for a seat."""
        self.is_closed = True
        self._traffics.close()

    async def empty(self) -> None:
        """Wait until no request is inside."""
        await self._empty.wait()

    @contextlib.asynccontextmanager
    async def enter(self, request: web.Request) -> AsyncIterator[tuple[RequestRecord, bytes]]:
        """Read the body and be inside; raise ApiError for what is refused."""
        with self._recorded(request) as record:
            if self.is_closed:
                raise shutting_down()
            body = await read_body(request, self._body_patience_seconds)
            with self._counted():  # only now: a body that never ends must not hold up a drain
                yield record, body

    @contextlib.contextmanager
    def _recorded(self, request: web.Request) -> Iterator[RequestRecord]:
        record = RequestRecord(request[REQUEST_ID], arrived=self._clock(), key=request.get(CALLER))
        try:
            yield record
        except ApiError as exc:
            record.refused(exc)
            raise
        except (asyncio.CancelledError, ConnectionResetError):
            record.gone()
            raise
        except BaseException as exc:
            record.refused(as_api_error(exc))
            raise
        finally:
            record.duration_seconds = self._clock() - record.arrived
            self._ended(record)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def _ended(self, record: RequestRecord) -> None:
        fields = record.fields()
        log.info("request finished", **fields)
        self._tap.publish("request", fields)
        self._metrics.count(
            record.model,
            status=record.status,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=record.completion_tokens,
            first_token_seconds=record.first_token_seconds,
            duration_seconds=record.duration_seconds,
            finish_reason=record.finish_reason,
        )
