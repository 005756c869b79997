"""What ``GET /fleet`` shows of a snapshot; pure.

Everything that takes a node or a model out of service has its reason here, in words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from cortex.gateway.catalogue import DEFAULT_CLASS, Catalogue
from cortex.gateway.config import Eviction
from cortex.gateway.drains import drain_of
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.housekeeping import patience_seconds
from cortex.ipc.fleet_api import FleetDevice, FleetModel, FleetNode
from cortex.ipc.node_api import ModelInfo


@dataclass(frozen=True)
class FleetViewer:
    """Shows nodes under the names and the rules that the operator wrote."""

    snapshot: FleetSnapshot
    catalogue: Catalogue
    eviction: Eviction

    def node(self, node: Node) -> FleetNode:
        """Return *node*, and what is on it while it is up."""
        known = node.health if node.is_healthy else None
        is_stopping = known is not None and known.draining
        return FleetNode(
            name=node.name,
            endpoint=node.url,
            is_engine=node.is_engine,
            healthy=node.is_healthy,
            since=node.since,
            failures=node.failures,
            error=node.error,
            breaker=node.breaker,
            takes_requests=node.takes_requests,
            why=None if node.takes_requests else why_not(node),
            draining=is_stopping or node.is_drained,
            drain=drain_of(self.snapshot, node) if node.is_drained else None,
            activation=known.activation if known else None,
            devices=_devices(node) if known else [],
            models=[self._model(node, model) for model in node.models] if node.is_healthy else [],
            load=known.models if known else [],
        )

    def _model(self, node: Node, model: ModelInfo) -> FleetModel:
        place = (node.name, model.id)
        public = self.catalogue.public_id(model.id)
        profile = self.catalogue.profiles.get(public)
        loads = node.health.models if node.health else []
        load = next((load for load in loads if load.id == model.id), None)
        return FleetModel(
            **{**msgspec.structs.asdict(model), "id": public},
            node_id=model.id,
            in_flight=load.in_flight if load else self.snapshot.load_of(node, model.id),
            queue_depth=load.queue_depth if load else 0,
            idle_seconds=round(self.snapshot.idle_seconds(place), 1),
            unload_in_seconds=self._unload_in_seconds(node, model),
            pinned=place in self.snapshot.pinned,
            residency_class=profile.residency_class if profile else DEFAULT_CLASS,
            footprint_mb=sum(d.weights_mb + d.kv_mb + d.workspace_mb for d in model.devices),
        )

    def _unload_in_seconds(self, node: Node, model: ModelInfo) -> float | None:
        place = (node.name, model.id)
        if node.is_engine or model.status != "loaded" or place in self.snapshot.pinned:
            return None
        patience = patience_seconds(self.snapshot, place, self.catalogue, self.eviction)
        left = patience - self.snapshot.idle_seconds(place)
        return None if math.isinf(patience) else round(max(left, 0.0), 1)


def why_not(node: Node) -> str:
    """Return why *node* takes no requests."""
    if not node.is_healthy:
        return "down" if node.error is None else f"down: {words_of(node)}"
    if node.is_drained:
        return "drained by an operator"
    if node.health is not None and node.health.draining:
        return "about to stop: it finishes what runs"
    return "closed by its breaker: it broke what it was given"


def words_of(node: Node) -> str:
    """Return its error, without the name that stands beside it anyway."""
    return (node.error or "").removeprefix(f"node {node.name} ")


def _devices(node: Node) -> list[FleetDevice]:
    found = node.discovery.devices if node.discovery else []
    totals = {device.index: device.vram_total_mb for device in found}
    return [
        FleetDevice(**msgspec.structs.asdict(device), vram_total_mb=totals.get(device.index))
        for device in (node.health.devices if node.health else [])
    ]
