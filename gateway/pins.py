"""Models that operators have pinned: never displaced, never unloaded for being idle.

A pin is a promise about a place, a model on a node. It loads nothing, and where nothing is loaded
it counts from the moment something is. It outlives the gateway, and its node's absence from the
configuration.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import structlog

from cortex.gateway.catalogue import Target
from cortex.gateway.fleet import Fleet, FleetSnapshot, Node, Place
from cortex.gateway.state import StateFile
from cortex.ipc.errors import InvalidRequest, ModelNotFound

THERE = ("loaded", "loading", "recovering")
log = structlog.get_logger()


class Pins:
    """Pins and unpins; the only one who changes ``Fleet.pinned``."""

    def __init__(self, fleet: Fleet, state: StateFile) -> None:
        self._fleet = fleet
        self._state = state

    async def read(self) -> None:
        """Take up what was pinned when the gateway stopped; raise sqlite3.Error."""
        self._fleet.pinned.update(await self._state.do(_read))

    def pin(self, target: Target, node: str | None) -> list[str]:
        """Pin *target* on *node*, else wherever it is, else wherever it may be; return the nodes.

        Raise ModelNotFound and InvalidRequest.
        """
        places = places_of(self._fleet.snapshot(), target, node)
        self._fleet.pinned.update(places)
        rows = [(model, name) for name, model in places]
        self._state.later(
            lambda connection: connection.executemany(
                "INSERT OR IGNORE INTO pins (model, node) VALUES (?, ?)", rows
            )
        )
        nodes = _names(places)
        log.info("model pinned", model=target.id, nodes=nodes)
        return nodes

    def unpin(self, target: Target, node: str | None) -> list[str]:
        """Take back the pin of *target* on *node*, else all of them; return the nodes it was on."""
        places = {
            place
            for place in self._fleet.pinned
            if place[1] == target.node_id and node in (None, place[0])
        }
        self._fleet.pinned.difference_update(places)
        rows = [(model, name) for name, model in places]
        self._state.later(
            lambda connection: connection.executemany(
                "DELETE FROM pins WHERE model = ? AND node = ?", rows
            )
        )
        nodes = _names(places)
        log.info("model unpinned", model=target.id, nodes=nodes)
        return nodes


def places_of(snapshot: FleetSnapshot, target: Target, node: str | None) -> set[Place]:
    """Return the places that a pin of *target* means; raise ModelNotFound and InvalidRequest."""
    neurons = [known for known in snapshot.nodes if not known.is_engine]
    if target.profile is None and not any(known.model(target.node_id) for known in neurons):
        raise ModelNotFound(
            f"{target.id!r} is not in the catalogue, and no neuron has it", param="model"
        )
    allowed = [known for known in neurons if _may_be(target, known)]
    if node is not None:
        if node not in [known.name for known in allowed]:
            raise InvalidRequest(_never_there(snapshot, target, node), param="node")
        return {(node, target.node_id)}
    loaded = [known for known in neurons if known.status_of(target.node_id) in THERE]
    return {(known.name, target.node_id) for known in loaded or allowed}


def _may_be(target: Target, node: Node) -> bool:
    bound = target.profile.pinned_on if target.profile else ()
    return not bound or node.name in bound


def _never_there(snapshot: FleetSnapshot, target: Target, node: str) -> str:
    if any(known.is_engine for known in snapshot.nodes if known.name == node):
        return f"{node!r} is an engine: nothing is ever loaded or displaced there"
    return f"the catalogue does not let {target.id!r} on {node!r}: see its pinned_on"


def _names(places: Iterable[Place]) -> list[str]:
    return sorted(node for node, _ in places)


def _read(connection: sqlite3.Connection) -> list[Place]:
    return connection.execute("SELECT node, model FROM pins").fetchall()
