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
PATHS_OF_OPENAI = ("/v1/chat/", "/v1/completions", "/v1/embeddings", "/v1/responses")
NOT_SERVED = re.compile(
    r"/v1/responses(/.*)?|/openapi\.json"
    r"|/fleet/(models/(un)?pin|nodes/[^/]+/(un)?drain)"
)
"""What the design names and this version lacks."""

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
        seconds = retry_after if retry_after and retry_after.isdigit() else None
        return cls(
            status or STATUS_OF_CODE.get(code, 502),
            code,
            str(message),
            param=param if isinstance(param, str) else None,
            retry_after_seconds=int(seconds) if seconds else None,
            extras=rest,
        )


def dialect_of(request: web.BaseRequest) -> Dialect:
    """Return the dialect that the client speaks, told by the path, else by its version header."""
    if request.path.startswith("/v1/messages"):
        return ANTHROPIC
    if request.path.startswith(PATHS_OF_OPENAI):
        return OPENAI
    return ANTHROPIC if "anthropic-version" in request.headers else OPENAI


def error_response(dialect: Dialect, error: ApiError, request_id: str) -> web.Response:
    """Return *error* as *dialect* says it; every 503 says when to come back."""
    retry_after = error.retry_after_seconds
    if retry_after is None and error.status == 503:
        retry_after = 1
    headers = {HEADER_SOURCE: "node" if isinstance(error, Relayed) else "gateway"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
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
    if allowed:
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
        case web.HTTPNotFound():
            if NOT_SERVED.fullmatch(request.path):
                return RouteNotFound(f"{request.path} is not served by this version")
            return RouteNotFound(f"there is no {request.method} {request.path} here")
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowed(f"{request.path} takes no {request.method}")
        case _:
            return InvalidRequest(error.reason)
