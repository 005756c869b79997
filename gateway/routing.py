"""Which replica takes a request, or what has to happen first; pure.

what we know of the model                          decision
loaded and servable on a node that takes requests  Serve: the session's home, else least loaded
the same, but full everywhere when last looked at  Serve: the node knows better by now
on its way on such a node                          Wait
on engines that have all that they may have        Refuse 503 overloaded
being unloaded, and in the catalogue               Load: there once it is gone, or elsewhere
there, but recovering or not servable              Refuse 503 recovering
there, but the node's breaker is open              Refuse 503 recovering: that takes seconds
no node takes requests                             Refuse 503 recovering
in the catalogue                                   Load
only on nodes that are down, draining or tried     Refuse 503 recovering
nowhere                                            Refuse 404

Of several replicas those that are full come last. An engine cannot say that it is: with
``max_in_flight`` requests of ours it gets no more. Of the others a session gets its home, or the
next that is not too busy (``affinity.py``); what belongs to none the least loaded; ties by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cortex.gateway.affinity import Session
from cortex.gateway.catalogue import Target
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.ipc.errors import ApiError, ModelNotFound, Overloaded, Recovering
from cortex.ipc.node_api import HEADER_NODE, HEADER_REASON

NOBODY: AbstractSet[str] = frozenset()


@dataclass(frozen=True)
class Serve:
    """Send it to *node*; *reason* goes into ``x-cortex-reason``."""

    node: Node
    reason: str

    def headers(self) -> dict[str, str]:
        """Return what tells a client who has answered it, and why that node."""
        return {HEADER_NODE: self.node.name, HEADER_REASON: self.reason}


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
    return sorted(_able(snapshot, model_id, excluded), key=_by_load(snapshot, model_id))


def _by_load(snapshot: FleetSnapshot, model_id: str) -> Callable[[Node], tuple[bool, int, str]]:
    return lambda node: (
        node.is_full or _is_full(node, model_id),
        snapshot.load_of(node, model_id),
        node.name,
    )


def _able(snapshot: FleetSnapshot, model_id: str, excluded: AbstractSet[str]) -> list[Node]:
    return [
        node
        for node in snapshot.nodes
        if node.name not in excluded and node.takes_requests and _serves(node, model_id)
    ]


def choose(
    snapshot: FleetSnapshot,
    model_id: str,
    excluded: AbstractSet[str] = NOBODY,
    session: Session | None = None,
) -> Serve | None:
    """Return the replica of *model_id* for a request of *session*, or None where there is none."""
    able = [node for node in _able(snapshot, model_id, excluded) if not node.is_full]
    if not able:
        return None
    if len(able) == 1:
        return Serve(able[0], "only-replica")
    if session is None:
        return Serve(min(able, key=_by_load(snapshot, model_id)), "least-loaded")
    in_its_order = sorted(able, key=lambda node: (session.rank(node.name), node.name), reverse=True)
    node = _not_too_busy(snapshot, model_id, session, in_its_order)
    return Serve(node, "session-home" if node is in_its_order[0] else "session-moved")


def _not_too_busy(
    snapshot: FleetSnapshot, model_id: str, session: Session, in_its_order: Sequence[Node]
) -> Node:
    """Return the first of those that are not full; where all are, of all."""
    open_ones = [node for node in in_its_order if not _is_full(node, model_id)] or in_its_order
    loads = [snapshot.load_of(node, model_id) for node in open_ones]
    fit = (
        node
        for node, load in zip(open_ones, loads, strict=True)
        if not session.is_too_busy(load, loads)
    )
    return next(fit)


def decide(
    snapshot: FleetSnapshot,
    target: Target,
    excluded: AbstractSet[str] = NOBODY,
    session: Session | None = None,
) -> Decision:
    """Return what to do with a request for *target*; *excluded* nodes have failed it already."""
    if serve := choose(snapshot, target.node_id, excluded, session):
        return serve
    up = [node for node in snapshot.nodes if node.takes_requests]
    candidates = [node for node in up if node.name not in excluded]
    if loading := [node for node in candidates if node.status_of(target.node_id) == "loading"]:
        return Wait(loading[0])
    if refused := _not_now(snapshot, target, candidates, excluded):
        return refused
    if up and target.profile:
        return Load()
    return Refuse(_nobody(snapshot, target, excluded))


def _not_now(
    snapshot: FleetSnapshot, target: Target, candidates: Iterable[Node], excluded: AbstractSet[str]
) -> Refuse | None:
    """Return what is said where the model is on nodes that cannot serve it at this moment."""
    if full := _able(snapshot, target.node_id, excluded):
        return Refuse(_overloaded(target, full))
    for node in candidates:
        if why := _not_servable(node, target):
            return Refuse(_later(f"{target.id!r} on node {node.name} {why}", 2), node)
    if resting := _resting(snapshot, target.node_id, excluded):
        seconds = min(math.ceil(node.resting_seconds) for node in resting)
        why = in_words(resting)
        return Refuse(_later(f"{target.id!r} cannot be served now: {why}", max(seconds, 1)))
    return None


def _overloaded(target: Target, full: Sequence[Node]) -> Overloaded:
    names = ", ".join(node.name for node in full)
    return Overloaded(
        f"{target.id!r} cannot be served now: {names} has all the requests that it may have",
        retry_after_seconds=1,
    )


def _resting(snapshot: FleetSnapshot, model_id: str, excluded: AbstractSet[str]) -> list[Node]:
    """Return the replicas that nothing but their breaker closes to requests."""
    return [
        node
        for node in snapshot.nodes
        if node.is_resting
        and not node.is_leaving
        and node.is_healthy
        and node.name not in excluded
        and _serves(node, model_id)
    ]


def _nobody(snapshot: FleetSnapshot, target: Target, excluded: AbstractSet[str]) -> ApiError:
    away = [n for n in snapshot.nodes if not n.takes_requests or n.name in excluded]
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
    return ", ".join(f"node {node.name} {_state(node)}" for node in away) or "there is none"


def _state(node: Node) -> str:
    if not node.is_healthy:
        return "is down"
    return "is draining" if node.is_leaving else "has just failed"


def _serves(node: Node, model_id: str) -> bool:
    model = node.model(model_id)
    if model is None or model.status != "loaded":
        return False
    return model.servable.ok or model.servable.is_full


def _is_full(node: Node, model_id: str) -> bool:
    model = node.model(model_id)
    return model is not None and model.servable.is_full


def _not_servable(node: Node, target: Target) -> str | None:
    model = node.model(target.node_id)
    if model is None or model.status in ("loading", "failed"):
        return None
    if model.status == "unloading" and target.profile:
        return None  # it may be loaded again, there or elsewhere
    if model.status == "loaded":
        return f"cannot be served: {model.servable.detail or model.servable.reason or 'no reason'}"
    return (
        f"is {model.status}: {detail}"
        if (detail := model.servable.detail)
        else f"is {model.status}"
    )


def _later(message: str, retry_after_seconds: int) -> Recovering:
    return Recovering(message, retry_after_seconds=retry_after_seconds)
