"""Nodes that operators have drained: nothing new goes there, what runs finishes, models leave.

    takes requests ──drain──► draining: requests run, or models are there
                                 │ its last request ends; ``housekeeper.py`` unloads, never by force
                                 ▼
                              drained: nothing is left; the host may be switched off
                              ──undrain──► takes requests

Pins hold nobody on a node that is drained, and are not forgotten: they count again when their model
is loaded there again. A drain outlives the gateway.
"""

from __future__ import annotations

import sqlite3

import structlog

from cortex.gateway.fleet import Fleet, FleetSnapshot, Node
from cortex.gateway.state import StateFile
from cortex.ipc.fleet_api import Drain

log = structlog.get_logger()


class Drains:
    """Drains and undrains; the only one who changes ``Fleet.drained``."""

    def __init__(self, fleet: Fleet, state: StateFile) -> None:
        self._fleet = fleet
        self._state = state

    async def read(self) -> None:
        """Take up what was drained when the gateway stopped; raise sqlite3.Error."""
        self._fleet.drained.update(await self._state.do(_read))

    def drain(self, node: str) -> None:
        """Send nothing new to *node*."""
        if node in self._fleet.drained:
            return
        self._fleet.drained.add(node)
        self._state.later(
            lambda connection: connection.execute(
                "INSERT OR IGNORE INTO drained (node) VALUES (?)", (node,)
            )
        )
        log.info("node draining", node=node)

    def undrain(self, node: str) -> None:
        """Let requests and loads go to *node* again."""
        if node not in self._fleet.drained:
            return
        self._fleet.drained.remove(node)
        self._state.later(
            lambda connection: connection.execute("DELETE FROM drained WHERE node = ?", (node,))
        )
        log.info("node undrained", node=node)


def drain_of(snapshot: FleetSnapshot, node: Node) -> Drain:
    """Return how far the drain of *node* has come; of a node that is down only ours can be told."""
    own = {model: count for (name, model), count in snapshot.own.items() if name == node.name}
    if not node.is_healthy:
        return Drain(done=not own, in_flight=sum(own.values()), models=[])
    loads = {load.id for load in node.health.models} if node.health else set()
    in_flight = sum(snapshot.load_of(node, model) for model in loads | own.keys())
    left = [] if node.is_engine else [m.id for m in node.models if m.status != "failed"]
    return Drain(done=not (in_flight or left), in_flight=in_flight, models=left)


def _read(connection: sqlite3.Connection) -> list[str]:
    return [node for (node,) in connection.execute("SELECT node FROM drained")]
