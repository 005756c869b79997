"""What operators ask of the fleet: how it is, and to load, unload, pin and drain.

Where keys are required, whoever changes something needs one with ``operator = true``. Any key may
look that may use every model: one that may not would see the others here.
"""

from __future__ import annotations

from typing import Literal

from aiohttp import web

from cortex.gateway.auth import principal_of
from cortex.gateway.catalogue import Target
from cortex.gateway.demands import Demand
from cortex.gateway.drains import drain_of
from cortex.gateway.fleet import Node
from cortex.gateway.fleet_view import FleetViewer
from cortex.gateway.routing import replicas
from cortex.gateway.services import SERVICES, Services, as_json, body_of
from cortex.ipc.errors import InvalidRequest, MissingModelField, OperatorOnly
from cortex.ipc.fleet_api import (
    DrainAnswer,
    DrainNode,
    FleetView,
    LoadAnswer,
    LoadModel,
    LoadView,
    PinAnswer,
    PinModel,
    UndrainAnswer,
    UnloadAnswer,
    UnloadModel,
    UnpinAnswer,
)
from cortex.ipc.requests import decode_body


async def fleet(request: web.Request) -> web.Response:
    """Every node: its devices, its models and their load while it is up, and why it is not."""
    services = _of_onlooker(request)
    await services.poller.settled()
    snapshot = services.fleet.snapshot()
    written = services.written
    viewer = FleetViewer(snapshot, written.catalogue, written.config.eviction)
    return as_json(
        FleetView(
            nodes=[viewer.node(node) for node in snapshot.nodes],
            loads=[_loading(load, snapshot.now) for load in services.lifecycle.loads],
            requests_in_flight=services.door.inside,
            draining=services.door.is_closed,
        )
    )


async def placement(request: web.Request) -> web.Response:
    """Where a model would go if somebody asked for it now; nothing is done."""
    services = _of_onlooker(request)
    model = request.query.get("model")
    if not model:
        raise MissingModelField("which model? GET /fleet/placement?model=ID", param="model")
    return as_json(await services.lifecycle.placement(_target(request, model)))


async def load(request: web.Request) -> web.Response:
    """Load a model of the catalogue: 202 once the load runs, or 200 when it is loaded."""
    services = _of_operator(request)
    asked = await body_of(request, lambda body: decode_body(body, LoadModel))
    await services.poller.first_round()
    node = _named(services, asked.node)
    target = _target(request, asked.model)
    running = services.lifecycle.load_unless_loaded(target, node=node)
    if running is None:
        there = [known.name for known in replicas(services.fleet.snapshot(), target.node_id)]
        return as_json(LoadAnswer("loaded", target.id, asked.node or there[0]))
    if not asked.wait:
        return as_json(LoadAnswer("loading", target.id, _place_of(running)), 202)
    await services.lifecycle.wait(running)
    return as_json(LoadAnswer("loaded", target.id, _place_of(running)))


async def unload(request: web.Request) -> web.Response:
    """Unload a model; a busy one only by force."""
    services = _of_operator(request)
    asked = await body_of(request, lambda body: decode_body(body, UnloadModel))
    await services.poller.first_round()
    _named(services, asked.node)
    target = _target(request, asked.model)
    return as_json(
        UnloadAnswer(
            await services.lifecycle.unload(
                target, node=asked.node, force=asked.force, reason="asked"
            )
        )
    )


async def pin(request: web.Request) -> web.Response:
    """Keep a model from being displaced; nothing is loaded for it."""
    services = _of_operator(request)
    asked = await body_of(request, lambda body: decode_body(body, PinModel))
    await services.poller.first_round()
    _named(services, asked.node)
    target = _target(request, asked.model)
    nodes = services.pins.pin(target, asked.node)
    models = [services.fleet.node(name).model(target.node_id) for name in nodes]
    return as_json(PinAnswer(nodes, any(m is not None and m.status == "loaded" for m in models)))


async def unpin(request: web.Request) -> web.Response:
    """Let a model be displaced again; also on a node that is no longer in the configuration."""
    services = _of_operator(request)
    asked = await body_of(request, lambda body: decode_body(body, PinModel))
    return as_json(UnpinAnswer(services.pins.unpin(_target(request, asked.model), asked.node)))


async def drain(request: web.Request) -> web.Response:
    """Send nothing new to a node; its models are unloaded as they fall idle."""
    services = _of_operator(request)
    await body_of(request, lambda body: decode_body(body or b"{}", DrainNode))
    name = _known(services, request.match_info["name"]).name
    services.drains.drain(name)
    snapshot = services.fleet.snapshot()
    progress = drain_of(snapshot, next(node for node in snapshot.nodes if node.name == name))
    status: Literal["draining", "drained"] = "drained" if progress.done else "draining"
    return as_json(DrainAnswer(name, progress, status))


async def undrain(request: web.Request) -> web.Response:
    """Let a node take requests and loads again."""
    services = _of_operator(request)
    await body_of(request, lambda body: decode_body(body or b"{}", DrainNode))
    name = _known(services, request.match_info["name"]).name
    services.drains.undrain(name)
    return as_json(UndrainAnswer(name))


def _loading(load: Demand, now: float) -> LoadView:
    return LoadView(
        model=load.target.id,
        phase=load.phase,
        seconds=round(now - load.since, 1),
        waiting_requests=load.waiting,
        node=_place_of(load),
        why=load.why,
        progress=load.progress,
    )


def _place_of(load: Demand) -> str | None:
    return load.node.name if load.node else load.only


def _of_operator(request: web.Request) -> Services:
    """Return the services, to somebody who may change the fleet; raise OperatorOnly."""
    services, principal = request.app[SERVICES], principal_of(request)
    if services.written.config.entitlements.require_auth and not principal.is_operator:
        raise OperatorOnly(
            f"the key {principal.key_id!r} may look at the fleet and not change it: that takes a "
            "key with operator = true"
        )
    return services


def _of_onlooker(request: web.Request) -> Services:
    """Return the services, to somebody who may see every model; raise OperatorOnly."""
    services, principal = request.app[SERVICES], principal_of(request)
    is_open = principal.is_operator or principal.models is None
    if services.written.config.entitlements.require_auth and not is_open:
        raise OperatorOnly(
            f"the key {principal.key_id!r} may use some models only, and the fleet has others: "
            "looking takes a key with operator = true, or one without models"
        )
    return services


def _target(request: web.Request, model: str) -> Target:
    """Return what *model* means; raise ModelNotAllowed."""
    catalogue = request.app[SERVICES].written.catalogue
    target = catalogue.target(model)
    principal_of(request).check_may_use(target.id, catalogue)
    return target


def _named(services: Services, name: str | None) -> Node | None:
    return None if name is None else _known(services, name)


def _known(services: Services, name: str) -> Node:
    """Return a node that a client has named; raise InvalidRequest."""
    nodes = services.fleet.snapshot().nodes
    node = next((node for node in nodes if node.name == name), None)
    if node is None:
        names = ", ".join(node.name for node in nodes)
        raise InvalidRequest(f"no node is called {name!r}; there are: {names}", param="node")
    return node
