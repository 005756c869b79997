"""OpenAI's Responses: one is made, or its prompt counted; stored ones are shown and deleted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from cortex.gateway.auth import principal_of
from cortex.gateway.counting import tokens_asked
from cortex.gateway.dialects.responses import decode_responses
from cortex.gateway.response_store import OwnResponses
from cortex.gateway.services import SERVICES, as_json, body_of
from cortex.gateway.shapes import InputTokens
from cortex.ipc.errors import InvalidRequest, UnsupportedParameter

ALL_ARE_LARGE = 0
"""In bytes: what goes on from a long conversation is a small body, and much to read."""
MAX_PAGE = 100
PAGE = 20
COUNT = re.compile(r"[0-9]{1,4}")


def _own(request: web.Request) -> OwnResponses:
    return request.app[SERVICES].responses.of(principal_of(request).key_id)


async def create(request: web.Request) -> web.StreamResponse:
    """One more response."""
    services, own = request.app[SERVICES], _own(request)
    stores = services.responses.stores
    return await services.proxy.serve(
        request, lambda body: decode_responses(body, own, stores=stores), ALL_ARE_LARGE
    )


async def input_tokens(request: web.Request) -> web.Response:
    """Tokens of the prompt that a request for a response has, without generating anything."""
    own = _own(request)
    call = await body_of(
        request, lambda body: decode_responses(body, own, stores=False), ALL_ARE_LARGE
    )
    return as_json(InputTokens(await tokens_asked(request, call)))


async def show(request: web.Request) -> web.Response:
    """A stored response, as it was answered."""
    if request.query.get("stream", "false") != "false":
        raise UnsupportedParameter(
            "'stream' is not supported by this version: a stored response comes whole",
            param="stream",
        )
    own, name = _own(request), request.match_info["id"]
    return await asyncio.to_thread(lambda: as_json(own.one(name).response))


async def delete(request: web.Request) -> web.Response:
    """Forget a stored response; what went on from it can then be looked at only."""
    name = request.match_info["id"]
    _own(request).drop(name)
    return as_json({"id": name, "object": "response", "deleted": True})


async def input_items(request: web.Request) -> web.Response:
    """What came in with the request for a stored response, the last item first unless asked."""
    own, name = _own(request), request.match_info["id"]
    return await asyncio.to_thread(lambda: as_json(page_of(own.one(name).input, request.query)))


def page_of(items: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Return the page of *items* that *query* asks for: order, after, limit.

    Raise InvalidRequest.
    """
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order is asc or desc", param="order")
    limit = query.get("limit", str(PAGE))
    if not COUNT.fullmatch(limit) or not 1 <= int(limit) <= MAX_PAGE:
        raise InvalidRequest(f"limit is a number from 1 to {MAX_PAGE}", param="limit")
    ordered = items if order == "asc" else items[::-1]
    begin = _after(ordered, query["after"]) if "after" in query else 0
    page = ordered[begin : begin + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + len(page) < len(ordered),
    }


def _after(items: list[dict[str, Any]], item_id: str) -> int:
    for index, item in enumerate(items):
        if item["id"] == item_id:
            return index + 1
    raise InvalidRequest(f"there is no item {item_id!r} in this response", param="after")
