"""Which replica takes a request, or what has to happen first; pure.

what we know of the model                          decision
loaded and servable on a node that takes requests  Serve: least loaded, ties by name
the same, but full everywhere when last looked at  Serve: the node knows better by now
on its way on such a node                          Wait
there, but recovering or not servable              Refuse 503 recovering
no node takes requests                             Refuse 503 recovering
in the catalogue                                   Load
only on a node that is down or draining            Refuse 503 recovering
nowhere                                            Refuse 404
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cortex.gateway.catalogue import Target
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.ipc.errors import ApiError, ModelNotFound, Recovering

NOBODY: AbstractSet[str] = frozenset()


@dataclass(frozen=True)
class Serve:
    """Send it to *node*; *reason* goes into ``x-cortex-reason``."""

    node: Node
    reason: str


@dataclass(frozen=True)
class Wait:
    """*node* is loading it."""

    node: Node


@dataclass(frozen=True)
class Load:
    """Nobody has it, somebody could."""


@dataclass(frozen=True)
class Refuse:
    """It cannot be served now, or at all; *node* is the one that might just have got over it."""

    error: ApiError
    node: Node | None = None


Decision = Serve | Wait | Load | Refuse


def replicas(
    snapshot: FleetSnapshot, model_id: str, excluded: AbstractSet[str] = NOBODY
) -> list[Node]:
    """Return the nodes that can serve *model_id* right now, the least loaded first.

    Those that were full are the last.
    """
    able = [
        node
        for node in snapshot.nodes
        if node.takes_requests
        and node.name not in excluded
        and (model := node.model(model_id)) is not None
        and model.status == "loaded"
        and (model.servable.ok or model.servable.is_full)
    ]
    return sorted(
        able,
        key=lambda node: (
            _is_full(node, model_id),
            snapshot.load_of(node, model_id),
            node.name,
        ),
    )


def decide(
    snapshot: FleetSnapshot, target: Target, excluded: AbstractSet[str] = NOBODY
) -> Decision:
    """Return what to do with a request for *target*; *excluded* nodes have failed it already."""
    if able := replicas(snapshot, target.node_id, excluded):
        return Serve(able[0], "only-replica" if len(able) == 1 else "least-loaded")
    up = [node for node in snapshot.nodes if node.takes_requests]
    candidates = [node for node in up if node.name not in excluded]
    if loading := [node for node in candidates if node.status_of(target.node_id) == "loading"]:
        return Wait(loading[0])
    for node in candidates:
        if why := _not_servable(node, target.node_id):
            return Refuse(_later(f"{target.id!r} on node {node.name} {why}", 2), node)
    if up and target.profile:
        return Load()
    return Refuse(_nobody(snapshot, target))


def _nobody(snapshot: FleetSnapshot, target: Target) -> ApiError:
    away = [node for node in snapshot.nodes if not node.takes_requests]
    if len(away) == len(snapshot.nodes):
        return _later(f"no node can take {target.id!r} now: {in_words(away)}", 5)
    if serving := [node for node in away if node.model(target.node_id)]:
        return _later(f"{target.id!r} cannot be served now: {in_words(serving)}", 3)
    return ModelNotFound(
        f"nobody serves the model {target.id!r}; GET /v1/models lists what there is",
        param="model",
    )


def in_words(away: Iterable[Node]) -> str:
    """Return why the nodes *away* take no requests: ``node a is down, node b is draining``."""
    states = [(node.name, "draining" if node.is_healthy else "down") for node in away]
    return ", ".join(f"node {name} is {state}" for name, state in states) or "there is none"


def _is_full(node: Node, model_id: str) -> bool:
    model = node.model(model_id)
    return model is not None and model.servable.is_full


def _not_servable(node: Node, model_id: str) -> str | None:
    model = node.model(model_id)
    if model is None or model.status in ("loading", "failed"):
        return None
    if model.status == "loaded":
        return f"cannot be served: {model.servable.detail or model.servable.reason or 'no reason'}"
    return (
        f"is {model.status}: {detail}"
        if (detail := model.servable.detail)
        else f"is {model.status}"
    )


def _later(message: str, retry_after_seconds: int) -> Recovering:
    return Recovering(message, retry_after_seconds=retry_after_seconds)
