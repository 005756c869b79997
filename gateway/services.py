"""What the handlers work with, and what all of them do: read a body, answer with JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from cortex.gateway.door import Door
from cortex.gateway.drains import Drains
from cortex.gateway.fleet import Fleet
from cortex.gateway.last_known import LastKnown
from cortex.gateway.ledger import Ledger
from cortex.gateway.lifecycle import Lifecycle
from cortex.gateway.metrics import Metrics
from cortex.gateway.pins import Pins
from cortex.gateway.poller import Poller
from cortex.gateway.proxy import Proxy
from cortex.gateway.response_store import ResponseStore
from cortex.gateway.state import StateFile
from cortex.gateway.upstream import NodeClient
from cortex.gateway.written import Written
from cortex.ipc.http_body import LARGE_BYTES, decoded, read_body

T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    """The parts of the gateway."""

    written: Written
    state: StateFile
    responses: ResponseStore
    fleet: Fleet
    poller: Poller
    last_known: LastKnown
    lifecycle: Lifecycle
    pins: Pins
    drains: Drains
    proxy: Proxy
    client: NodeClient
    metrics: Metrics
    door: Door
    ledger: Ledger


SERVICES = web.AppKey("services", Services)


async def body_of(
    request: web.Request, decode: Callable[[bytes], T], large_bytes: int = LARGE_BYTES
) -> T:
    """Return what *decode* finds in the body; from *large_bytes* on it looks in a thread."""
    patience_seconds = request.app[SERVICES].written.timeouts.client_stalled_seconds
    return await decoded(await read_body(request, patience_seconds), decode, large_bytes)


def as_json(value: Any, status: int = 200) -> web.Response:
    """Return *value*, structs in it or not, as an answer."""
    return web.Response(
        body=msgspec.json.encode(value), content_type="application/json", status=status
    )
