"""Failures become HTTP here, and nowhere else.

Raise the specific ``cortex.ipc.errors.ApiError`` where it is known; ``errors_in_dialect`` renders
it in the envelope of the dialect that the client speaks. What nobody foresaw is a 500 whose text is
logged, not shown. ``x-cortex-source`` tells whether the gateway or a node refused.
"""

from __future__ import annotations

import os
import re
from typing import Any, Self

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from cortex.gateway.dialects.anthropic import ANTHROPIC
from cortex.gateway.dialects.dialect import Dialect
from cortex.gateway.dialects.openai import OPENAI
from cortex.gateway.request_id import id_of, sign
from cortex.ipc import errors as ipc_errors
from cortex.ipc.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
)

HEADER_SOURCE = "x-cortex-source"
BUG = "internal error; the log of the gateway has it by the id of this request"
WEBSOCKET = "websocket"
PATHS_OF_OPENAI = ("/v1/chat/", "/v1/completions", "/v1/embeddings", "/v1/responses")
NOT_SERVED = {
    "/v1/responses/compact": "a summary needs a prompt, and the gateway puts no words of its own "
    "into prompts; ask the model for a summary and go on from that",
}
"""What clients may know to ask for, and why it is not here."""

SECONDS = re.compile(r"[0-9]{1,9}")
LONGEST_SLEEP_SECONDS = 60
"""The SDKs of both dialects sleep as long as ``Retry-After`` says, for hours if need be, and tell
nobody; ``x-should-retry`` is how they are told not to."""

log = structlog.get_logger()

STATUS_OF_CODE = {
    kind.code: kind.status
    for kind in vars(ipc_errors).values()
    if isinstance(kind, type) and issubclass(kind, ApiError)
}


class Relayed(ApiError):
    """What a node refused with: status, code, words, numbers and Retry-After are its own."""

    def __init__(self, status: int, code: str, message: str, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.status = status
        self.code = code

    @classmethod
    def of(
        cls,
        status: int | None,
        error: dict[str, Any],
        retry_after: str | None = None,
        *,
        otherwise: str = "the node gave no reason",
    ) -> Self:
        """Return the error in a node's error object; without a status its code tells it."""
        rest = dict(error)
        code = rest.pop("code", None)
        code = code if isinstance(code, str) else "node_failed"
        message = rest.pop("message", None) or otherwise
        param = rest.pop("param", None)
        rest.pop("type", None)
        return cls(
            status or STATUS_OF_CODE.get(code, 502),
            code,
            str(message),
            param=param if isinstance(param, str) else None,
            retry_after_seconds=seconds_in(retry_after),
            extras=rest,
        )


def seconds_in(retry_after: str | None) -> int | None:
    """Return what a ``Retry-After`` says, or None where it is a date, or nothing sensible."""
    found = SECONDS.fullmatch(retry_after or "")
    return int(found[0]) if found else None


def dialects_at(path: str) -> tuple[Dialect, ...]:
    """Return the dialect that is spoken at *path*, or both where the client may choose."""
    if path.startswith("/v1/messages"):
        return (ANTHROPIC,)
    return (OPENAI,) if path.startswith(PATHS_OF_OPENAI) else (OPENAI, ANTHROPIC)


def dialect_of(request: web.BaseRequest) -> Dialect:
    """Return the dialect that the client speaks, told by the path, else by its version header."""
    dialects = dialects_at(request.path)
    return dialects[-1] if "anthropic-version" in request.headers else dialects[0]


def _is_worth_waiting(error: ApiError) -> bool:
    """Whether an SDK should sleep and try again: not where a budget is spent for a long time."""
    if error.code == "insufficient_quota":
        return False
    return error.status == 503 or (error.retry_after_seconds or 0) <= LONGEST_SLEEP_SECONDS


def error_response(dialect: Dialect, error: ApiError, request_id: str) -> web.Response:
    """Return *error* as *dialect* says it; every 503 says when to come back."""
    retry_after = error.retry_after_seconds
    if retry_after is None and error.status == 503:
        retry_after = 1
    headers = {HEADER_SOURCE: "node" if isinstance(error, Relayed) else "gateway"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if error.status in (429, 503):
        headers["x-should-retry"] = "true" if _is_worth_waiting(error) else "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(
        dialect.envelope(error, request_id), status=dialect.status(error), headers=headers
    )


@web.middleware
async def errors_in_dialect(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every exception in the client's dialect, and log those that are bugs."""
    refused: ApiError
    allowed = None
    try:
        return await handler(request)
    except ApiError as error:
        refused = error
    except web.HTTPException as error:
        refused = _of_aiohttp(request, error)
        allowed = error.headers.get("Allow")
    except Exception:
        log.exception("request failed")
        refused = InternalError(BUG)
    response = error_response(dialect_of(request), refused, id_of(request))
    if allowed and refused.status == 405:
        response.headers["Allow"] = allowed
    if request.content.exception():  # where the next request begins cannot be told
        response.force_close()
    return response


def refuse(request: web.BaseRequest, error: ApiError) -> web.Response:
    """Answer what never reached the middlewares, as they do."""
    response = error_response(dialect_of(request), error, id_of(request))
    sign(request, response)
    return response


def reason_of(error: OSError) -> str:
    """Return why a connection could not be made, or a port not be had, without the address."""
    if error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return (error.strerror or str(error)).lower()  # a name that means nothing, say


def _of_aiohttp(request: web.Request, error: web.HTTPException) -> ApiError:
    match error:
        case web.HTTPMethodNotAllowed() if why := NOT_SERVED.get(request.path):
            return RouteNotFound(f"{request.path} is not served: {why}")
        case web.HTTPNotFound():
            return RouteNotFound(f"there is no {request.method} {request.path} here")
        case web.HTTPMethodNotAllowed() if request.headers.get("Upgrade", "").lower() == WEBSOCKET:
            return MethodNotAllowed(
                f"{request.path} speaks no WebSocket: POST to it and read its events"
            )
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowed(f"{request.path} takes no {request.method}")
        case _:
            return InvalidRequest(error.reason)
