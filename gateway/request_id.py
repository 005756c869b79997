"""Every request has an id: the client's where it is sane, else a new one; answers carry it."""

from __future__ import annotations

import re
import uuid

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from cortex.ipc.node_api import HEADER_REQUEST_ID

_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY = web.RequestKey("request_id", str)


def id_of(request: web.BaseRequest) -> str:
    """Return the id of *request*, which it is given when it is first asked for."""
    if _KEY not in request:
        given = request.headers.get(HEADER_REQUEST_ID, "")
        request[_KEY] = given if _SANE.fullmatch(given) else f"req_{uuid.uuid4().hex}"
    return request[_KEY]


@web.middleware
async def identify(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and bind it to every log line of it."""
    with structlog.contextvars.bound_contextvars(request_id=id_of(request)):
        return await handler(request)


async def name_the_answer(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Put the id on *response*, under our name and under the one that Anthropic's SDK reads."""
    sign(request, response)


def sign(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Do the same to the answer of a request that reached no middleware."""
    response.headers["Server"] = "cortex"
    response.headers[HEADER_REQUEST_ID] = id_of(request)
    response.headers["request-id"] = id_of(request)
