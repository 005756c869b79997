"""What every request passes: it gets an id, and whatever goes wrong becomes one JSON shape.

``errors_as_json`` is the only renderer of errors. Routes raise ``ApiError``; what aiohttp raises
and what is a bug are turned into one here.
"""

from __future__ import annotations

import re
import uuid

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from cortex.ipc.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
)
from cortex.ipc.node_api import HEADER_REQUEST_ID

log = structlog.get_logger()

REQUEST_ID = web.RequestKey("request_id", str)
FIT = re.compile(r"[\x21-\x7e]{1,128}")
RAISED_BY_AIOHTTP: dict[int, tuple[type[ApiError], str]] = {
    404: (RouteNotFound, "there is no such path"),
    405: (MethodNotAllowed, "the path exists, but not with this method"),
}


@web.middleware
async def with_request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take the caller's ``x-request-id`` where it is fit, else make one; every line has it."""
    _identify(request)
    with structlog.contextvars.bound_contextvars(request_id=request[REQUEST_ID]):
        return await handler(request)


async def echo_request_id(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Put the request's id in the answer, just before its headers go out."""
    _sign(request, response)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every exception with the envelope; log those that are bugs."""
    try:
        return await handler(request)
    except ApiError as exc:
        response = error_response(exc)
        if request.content.exception():  # where the next request begins cannot be told
            response.force_close()
        return response
    except web.HTTPException as exc:
        response = error_response(as_api_error(exc))
        if "Allow" in exc.headers:
            response.headers["Allow"] = exc.headers["Allow"]
        return response
    except ConnectionResetError:
        raise  # the client is gone: nobody to answer
    except Exception as exc:
        log.exception("request failed", path=request.path)
        return error_response(as_api_error(exc))


def as_api_error(exc: BaseException) -> ApiError:
    """Return what *exc* is to a client; a bug keeps its text to itself."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, web.HTTPException):
        kind, text = RAISED_BY_AIOHTTP.get(exc.status, (InvalidRequest, exc.reason))
        return kind(text)
    return InternalError("internal error")


def refuse(request: web.BaseRequest, error: ApiError) -> web.Response:
    """Answer what never reached the middlewares, as they do."""
    _identify(request)
    response = error_response(error)
    _sign(request, response)
    return response


def error_response(error: ApiError) -> web.Response:
    """Return *error* as an HTTP answer."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=error.status,
        body=msgspec.json.encode(error.body()),
        content_type="application/json",
        headers=headers,
    )


def _identify(request: web.BaseRequest) -> None:
    given = request.headers.get(HEADER_REQUEST_ID, "")
    request[REQUEST_ID] = given if FIT.fullmatch(given) else uuid.uuid4().hex


def _sign(request: web.BaseRequest, response: web.StreamResponse) -> None:
    response.headers[HEADER_REQUEST_ID] = request.get(REQUEST_ID, "")
    response.headers["Server"] = "neuron"
