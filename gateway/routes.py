"""One short handler per endpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from cortex.gateway import listing
from cortex.gateway.auth import Principal, principal_of
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import GatewayConfig
from cortex.gateway.counting import count_tokens
from cortex.gateway.dialects.anthropic import ANTHROPIC
from cortex.gateway.dialects.chat import PassedOn
from cortex.gateway.dialects.messages import decode_messages
from cortex.gateway.door import Door
from cortex.gateway.errors import dialect_of
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.lifecycle import Lifecycle
from cortex.gateway.poller import Poller
from cortex.gateway.proxy import Proxy
from cortex.gateway.renaming import Renaming
from cortex.gateway.request_id import id_of
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import InvalidRequest, ModelNotFound
from cortex.ipc.http_body import decoded, read_body
from cortex.ipc.openai_answers import ModelEntry, ModelList
from cortex.ipc.requests import decode_body
from cortex.ipc.version import BUILD

T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    """What the handlers work with."""

    config: GatewayConfig
    catalogue: Catalogue
    fleet: Fleet
    poller: Poller
    lifecycle: Lifecycle
    proxy: Proxy
    client: NodeClient
    door: Door


SERVICES = web.AppKey("services", Services)


class FleetLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /fleet/models/load``; without ``node`` placement chooses one."""

    model: Annotated[str, Meta(min_length=1)]
    node: str | None = None
    wait: bool = False


class FleetUnload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /fleet/models/unload``; without ``node`` from wherever it is."""

    model: Annotated[str, Meta(min_length=1)]
    node: str | None = None
    force: bool = False


def add_routes(app: web.Application) -> None:
    """Put every endpoint into *app*."""
    app.add_routes(
        [
            web.post("/v1/chat/completions", completions),
            web.post("/v1/completions", completions),
            web.post("/v1/embeddings", completions),
            web.post("/v1/messages", messages),
            web.post("/v1/messages/count_tokens", messages_count_tokens),
            web.get("/v1/models", models),
            web.get("/v1/models/{id:.+}", model),
            web.get("/", health),
            web.head("/api/hello", health),
            web.get("/health", health),
            web.get("/version", version),
            web.get("/fleet", fleet),
            web.post("/fleet/models/load", load),
            web.post("/fleet/models/unload", unload),
        ]
    )


async def completions(request: web.Request) -> web.StreamResponse:
    """Chat and text completions, and embeddings: the node has the same path."""
    return await request.app[SERVICES].proxy.serve(
        request, lambda body: PassedOn.of(request.path, body)
    )


async def messages(request: web.Request) -> web.StreamResponse:
    """Anthropic's Messages."""
    services = request.app[SERVICES]
    strip = services.config.anthropic.strip_billing_block
    return await services.proxy.serve(
        request, lambda body: decode_messages(body, strip_billing_block=strip, counts_only=False)
    )


async def messages_count_tokens(request: web.Request) -> web.Response:
    """Tokens of a prompt, without generating anything."""
    services = request.app[SERVICES]
    strip = services.config.anthropic.strip_billing_block
    call = await _asked(
        request,
        lambda body: decode_messages(body, strip_billing_block=strip, counts_only=True),
    )
    target = services.catalogue.target(call.model)
    principal_of(request).check_may_use(target.id, services.catalogue)
    await services.poller.first_round()
    with Renaming(target.node_id, call.model).errors():
        count = await count_tokens(
            services.fleet.snapshot(), services.client, target, call, id_of(request)
        )
    return web.json_response({"input_tokens": count})


def _entries(services: Services, principal: Principal) -> list[ModelEntry]:
    return listing.entries(
        services.fleet.snapshot(),
        services.catalogue,
        lambda model: principal.may_use(model, services.catalogue),
    )


async def models(request: web.Request) -> web.Response:
    """Everything that can be served, in the client's dialect."""
    services = request.app[SERVICES]
    await services.poller.settled()
    found = _entries(services, principal_of(request))
    if dialect_of(request) is ANTHROPIC:
        return web.json_response(listing.anthropic_page(found, dict(request.query)))
    return _json(ModelList(found))


async def model(request: web.Request) -> web.Response:
    """One of them; ids may hold slashes and colons, escaped or not."""
    name = request.match_info["id"]
    services, principal = request.app[SERVICES], principal_of(request)
    principal.check_may_use(services.catalogue.target(name).id, services.catalogue)
    await services.poller.settled()
    found = next((entry for entry in _entries(services, principal) if entry.id == name), None)
    if found is None:
        raise ModelNotFound(f"nobody serves the model {name!r}", param="model")
    if dialect_of(request) is ANTHROPIC:
        return web.json_response(listing.anthropic_entry(found))
    return _json(found)


async def health(request: web.Request) -> web.Response:
    """How the fleet is, for people and load balancers; always 200."""
    services = request.app[SERVICES]
    nodes = services.fleet.snapshot().nodes
    healthy = [node for node in nodes if node.is_healthy]
    unservable = [
        {"node": node.name, "model": m.id, "reason": m.servable.reason, "detail": m.servable.detail}
        for node in healthy
        for m in node.models
        if m.status in ("loaded", "recovering") and not (m.servable.ok or m.servable.is_full)
    ]
    is_whole = len(healthy) == len(nodes) and not unservable
    status = "ok" if is_whole else "impaired" if healthy else "degraded"
    body: dict[str, Any] = {
        "status": "draining" if services.door.is_closed else status,
        "nodes": {"healthy": len(healthy), "total": len(nodes)},
    }
    if unservable:
        body["unservable"] = unservable
    return web.json_response(body)


async def version(_: web.Request) -> web.Response:
    """Which build this is."""
    return _json(BUILD)


async def fleet(request: web.Request) -> web.Response:
    """Every node: its devices, its models and their load while it is up, and why it is not."""
    services = request.app[SERVICES]
    await services.poller.settled()
    snapshot = services.fleet.snapshot()
    return _json(
        {
            "nodes": [_node(node) for node in snapshot.nodes],
            "requests_in_flight": services.door.inside,
            "draining": services.door.is_closed,
        }
    )


def _node(node: Node) -> dict[str, Any]:
    known = node.health if node.is_healthy else None
    return {
        "name": node.name,
        "endpoint": node.url,
        "healthy": node.is_healthy,
        "since": node.since,
        "failures": node.failures,
        "error": node.error,
        "draining": known.draining if known else False,
        "activation": known.activation if known else None,
        "devices": known.devices if known else [],
        "models": node.models if known else [],
        "load": known.models if known else [],
    }


async def load(request: web.Request) -> web.Response:
    """Load a model of the catalogue: 202 once the load runs, or 200 when it is loaded."""
    services = request.app[SERVICES]
    asked = await _asked(request, lambda body: decode_body(body, FleetLoad))
    await services.poller.first_round()
    node = _known_node(services.fleet, asked.node)
    target = services.catalogue.target(asked.model)
    principal_of(request).check_may_use(target.id, services.catalogue)
    running = services.lifecycle.load_unless_loaded(target, node=node)
    if running is None:
        return web.json_response({"status": "loaded"})
    if not asked.wait:
        said = {"status": "loading", "node": running.node.name}
        return web.json_response(said, status=202)
    await services.lifecycle.wait(running)
    return web.json_response({"status": "loaded", "node": running.node.name})


async def unload(request: web.Request) -> web.Response:
    """Unload a model; a busy one only by force."""
    services = request.app[SERVICES]
    asked = await _asked(request, lambda body: decode_body(body, FleetUnload))
    await services.poller.first_round()
    _known_node(services.fleet, asked.node)
    target = services.catalogue.target(asked.model)
    principal_of(request).check_may_use(target.id, services.catalogue)
    nodes = await services.lifecycle.unload(target, node=asked.node, force=asked.force)
    return web.json_response({"status": "unloaded", "nodes": nodes})


async def _asked(request: web.Request, decode: Callable[[bytes], T]) -> T:
    patience_seconds = request.app[SERVICES].config.timeouts.client_stalled_seconds
    return await decoded(await read_body(request, patience_seconds), decode)


def _known_node(known: Fleet, name: str | None) -> Node | None:
    if name is None:
        return None
    node = next((node for node in known.snapshot().nodes if node.name == name), None)
    if node is None:
        raise InvalidRequest(f"no neuron is called {name!r}", param="node")
    return node


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
