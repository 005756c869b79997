"""One short handler per endpoint of inference; those of the fleet are in ``fleet_routes.py``.

``route_table.py`` says where each of them is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web
from msgspec import UNSET

from cortex.gateway.anthropic_listing import anthropic_entry, anthropic_page
from cortex.gateway.auth import Principal, principal_of
from cortex.gateway.counting import tokens_asked
from cortex.gateway.dialects.anthropic import ANTHROPIC, check_version
from cortex.gateway.dialects.chat import PassedOn
from cortex.gateway.dialects.messages import decode_messages
from cortex.gateway.errors import dialect_of
from cortex.gateway.fleet import Node
from cortex.gateway.listing import Listing
from cortex.gateway.renaming import Renaming
from cortex.gateway.services import SERVICES, Services, as_json, body_of
from cortex.gateway.written import Written
from cortex.ipc.errors import ModelNotFound
from cortex.ipc.node_api import ModelInfo
from cortex.ipc.openai_answers import ModelEntry, ModelList
from cortex.ipc.version import BUILD

DOCUMENT = web.AppKey("document", bytes)


async def completions(request: web.Request) -> web.StreamResponse:
    """Chat and text completions, and embeddings: the node has the same path."""
    return await request.app[SERVICES].proxy.serve(
        request, lambda body: PassedOn.of(request.path, body)
    )


async def messages(request: web.Request) -> web.StreamResponse:
    """Anthropic's Messages."""
    check_version(request.headers)
    services = request.app[SERVICES]
    strip = services.written.config.anthropic.strip_billing_block
    return await services.proxy.serve(
        request, lambda body: decode_messages(body, strip_billing_block=strip, counts_only=False)
    )


async def messages_count_tokens(request: web.Request) -> web.Response:
    """Tokens of a prompt, without generating anything."""
    check_version(request.headers)
    services = request.app[SERVICES]
    strip = services.written.config.anthropic.strip_billing_block
    call = await body_of(
        request,
        lambda body: decode_messages(body, strip_billing_block=strip, counts_only=True),
    )
    return web.json_response({"input_tokens": await tokens_asked(request, call)})


def _entries(services: Services, principal: Principal) -> list[ModelEntry]:
    catalogue = services.written.catalogue
    snapshot, least_mb = services.fleet.snapshot(), services.lifecycle.least_mb
    listing = Listing(snapshot, catalogue, services.last_known.of, least_mb)
    return listing.entries(lambda model: principal.may_use(model, catalogue))


async def models(request: web.Request) -> web.Response:
    """Everything that can be served, in the client's dialect."""
    services = request.app[SERVICES]
    await services.poller.settled()
    found = _entries(services, principal_of(request))
    if dialect_of(request) is ANTHROPIC:
        return web.json_response(anthropic_page(found, request.query))
    is_codex = "client_version" in request.query
    return as_json(ModelList(found, models=[] if is_codex else UNSET))


async def model(request: web.Request) -> web.Response:
    """One of them; ids may hold slashes and colons, escaped or not."""
    name = request.match_info["id"]
    services, principal = request.app[SERVICES], principal_of(request)
    catalogue = services.written.catalogue
    principal.check_may_use(catalogue.target(name).id, catalogue)
    await services.poller.settled()
    found = next((entry for entry in _entries(services, principal) if entry.id == name), None)
    if found is None:
        raise ModelNotFound(f"nobody serves the model {name!r}", param="model")
    if dialect_of(request) is ANTHROPIC:
        return web.json_response(anthropic_entry(found))
    return as_json(found)


async def health(request: web.Request) -> web.Response:
    """How the fleet is, for people and load balancers; always 200."""
    services = request.app[SERVICES]
    nodes = services.fleet.snapshot().nodes
    healthy = [node for node in nodes if node.is_healthy]
    unservable = [
        (node, model)
        for node in healthy
        for model in node.models
        if model.status in ("loaded", "recovering")
        and not (model.servable.ok or model.servable.is_full)
    ]
    is_whole = len(healthy) == len(nodes) and not unservable
    status = "ok" if is_whole else "impaired" if healthy else "degraded"
    body: dict[str, Any] = {
        "status": "draining" if services.door.is_closed else status,
        "nodes": {"healthy": len(healthy), "total": len(nodes)},
    }
    if shown := _shown(services.written, principal_of(request), unservable):
        body["unservable"] = shown
    return web.json_response(body)


def _shown(
    written: Written, principal: Principal, unservable: Iterable[tuple[Node, ModelInfo]]
) -> list[dict[str, str | None]]:
    """Return those models that *principal* may know of, as clients call them.

    Where keys are required, whoever comes without one, a load balancer say, is told of none.
    """
    if written.config.entitlements.require_auth and principal.key_id is None:
        return []
    catalogue = written.catalogue
    return [
        {
            "node": node.name,
            "model": public,
            "reason": model.servable.reason,
            "detail": Renaming(model.id, public).text(model.servable.detail or "") or None,
        }
        for node, model in unservable
        if principal.may_use(public := catalogue.public_id(model.id), catalogue)
    ]


async def version(_: web.Request) -> web.Response:
    """Which build this is."""
    return as_json(BUILD)


async def openapi(request: web.Request) -> web.Response:
    """All of this, as an OpenAPI document."""
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")
