"""An HTTP server that answers in the daemon's own shape also what no handler ever sees.

aiohttp says in plain text, before any middleware, that bytes are not HTTP, that a head is too large
and that an ``Expect`` cannot be met; here ``Refuse`` renders these too. A client that sends its
head slowly, or nothing at all, loses its connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import structlog
from aiohttp import web

from cortex.ipc.errors import ApiError, ExpectationFailed, InternalError, InvalidRequest

Refuse = Callable[[web.BaseRequest, ApiError], web.StreamResponse]

IDLE_SECONDS = 75.0
"""Until a connection has sent the head of its next request; longer than proxies keep theirs."""

NO_WORD = re.compile(r"[^\x21-\x7e]+")
WORDS = 160

log = structlog.get_logger()


class HttpRunner(web.AppRunner):
    """Runs *app*, whose handlers are cancelled when their client leaves; *refuse* as above."""

    def __init__(
        self,
        app: web.Application,
        refuse: Refuse,
        *,
        shutdown_timeout: float,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        super().__init__(
            app,
            access_log=None,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=idle_seconds,
            shutdown_timeout=shutdown_timeout,
        )
        self._refuse = refuse

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            _rendering(made.request_handler, self._refuse),
            request_factory=made.request_factory,
            refuse=self._refuse,
            **self._kwargs,
        )


class _Server(web.Server):
    """Makes connections of our kind; *refuse* as above, the rest as aiohttp's."""

    def __init__(self, handler: Any, *, refuse: Refuse, **rest: Any) -> None:
        super().__init__(handler, **rest)
        self._refuse = refuse

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._refuse, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ("_refuse",)

    def __init__(self, server: web.Server, refuse: Refuse, **rest: Any) -> None:
        super().__init__(server, **rest)
        self._refuse = refuse

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to what is not HTTP, or to a bug outside of the middlewares."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: there is no room for another")
        error: ApiError
        if status < 500:
            error = InvalidRequest(f"this is not HTTP: {printable(message or 'nothing')}")
            log.info("request not understood", error=str(error), client=request.remote)
        else:
            error = InternalError("internal error")
            log.error("request failed", exc_info=exc)
        response = self._refuse(request, error)
        response.force_close()
        return response


def printable(text: str) -> str:
    """Return the first line of *text*, short and without what could upset a terminal."""
    return NO_WORD.sub(" ", text.strip().partition("\n")[0])[:WORDS].strip(" :")


def _rendering(handler: Any, refuse: Refuse) -> Any:
    """Return *handler* with what aiohttp raises around the middlewares rendered as well."""

    async def render(request: web.BaseRequest) -> web.StreamResponse:
        try:
            answer: web.StreamResponse = await handler(request)
        except web.HTTPExpectationFailed as exc:
            return refuse(request, ExpectationFailed(printable(exc.text or exc.reason)))
        return answer

    return render
