"""What the gateway does by itself when nobody asks: decided here, pure, row by row.

what we know of a node that is up and polled        act
an operator has drained it, a model has no request  unload it, pinned or not
a model has had no request for longer than it may   unload it, unless it is pinned
nothing is on a device, and it has had many loads   give the device a new process
a node has come up, and a model wants preloading    load it, where nothing must go for it

How long a model may be idle: what the ``keep_alive`` of its last request said, else its profile,
else ``[eviction]``. Nothing is done to an engine. ``housekeeper.py`` acts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Eviction
from cortex.gateway.fleet import FleetSnapshot, Node, Place
from cortex.ipc.node_api import DeviceHealth

NOBODY: AbstractSet[str] = frozenset()


@dataclass(frozen=True)
class Unload:
    """Take a model, by its name there, off a node."""

    node: str
    model: str
    reason: Literal["drained", "idle"]
    idle_seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"unload {self.model} from {self.node} ({self.reason})"


@dataclass(frozen=True)
class Restart:
    """Give a device a new process: its memory is in pieces."""

    node: str
    device: int
    cycles: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"restart device {self.device} of {self.node}"


@dataclass(frozen=True)
class Preload:
    """Load a model of the catalogue if there is room."""

    model: str

    def __str__(self) -> str:
        return f"preload {self.model}"


Act = Unload | Restart | Preload
Comings = frozenset[tuple[str, float]]
"""Nodes and when each came up."""


def due(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    eviction: Eviction,
    loading: AbstractSet[str] = NOBODY,
) -> list[Act]:
    """Return what is to be done now; *loading* are nodes that loads of ours are on the way to."""
    acts: list[Act] = []
    for node in snapshot.nodes:
        if node.is_engine or not node.is_healthy or node.failures:
            continue
        acts += _unloads(snapshot, node, catalogue, eviction)
        if node.name not in loading:
            acts += _restarts(node, eviction)
    return acts


def _unloads(
    snapshot: FleetSnapshot, node: Node, catalogue: Catalogue, eviction: Eviction
) -> Iterator[Unload]:
    for model in node.models:
        place = (node.name, model.id)
        if model.status != "loaded" or snapshot.load_of(node, model.id):
            continue
        idle_seconds = snapshot.idle_seconds(place)
        if node.is_drained:
            yield Unload(node.name, model.id, "drained", idle_seconds)
        elif place in snapshot.pinned:
            continue
        elif idle_seconds >= patience_seconds(snapshot, place, catalogue, eviction):
            yield Unload(node.name, model.id, "idle", idle_seconds)


def patience_seconds(
    snapshot: FleetSnapshot, place: Place, catalogue: Catalogue, eviction: Eviction
) -> float:
    """Return how long the model at *place* may be idle; infinite: for ever."""
    if (stay := snapshot.stay_seconds.get(place)) is not None:
        return stay
    profile = catalogue.profiles.get(catalogue.public_id(place[1]))
    said = profile.idle_unload_seconds if profile else None
    return (eviction.idle_unload_seconds if said is None else said) or math.inf


def _restarts(node: Node, eviction: Eviction) -> Iterator[Restart]:
    cycles = eviction.defrag_after_cycles
    if not cycles or node.health is None or node.is_loading:
        return
    held = {d.index for model in node.models if model.status != "failed" for d in model.devices}
    for device in node.health.devices:
        if _is_worn(device, cycles) and device.index not in held:
            yield Restart(node.name, device.index, device.lifecycle_cycles)


def _is_worn(device: DeviceHealth, cycles: int) -> bool:
    return device.state == "ready" and device.lifecycle_cycles >= cycles


def preloads(
    snapshot: FleetSnapshot, catalogue: Catalogue, seen: Mapping[str, Comings]
) -> tuple[list[Preload], dict[str, Comings]]:
    """Return what to preload now, and for each model the nodes it has had its chance at.

    It gets one whenever a node that may have it comes up: because the gateway has started, or the
    node, or an operator undrained it. *seen* is what the last call returned.
    """
    wanted = [profile for profile in catalogue.profiles.values() if profile.preload]
    now = {profile.id: _comings(snapshot, profile) for profile in wanted}
    due_now = [
        Preload(profile.id)
        for profile in wanted
        if now[profile.id] - seen.get(profile.id, frozenset())
        and not _is_somewhere(snapshot.nodes, profile.node_id)
    ]
    return due_now, now


def _comings(snapshot: FleetSnapshot, profile: Profile) -> Comings:
    return frozenset(
        (node.name, node.since)
        for node in snapshot.nodes
        if node.is_healthy
        and not (node.is_engine or node.is_drained)
        and (not profile.pinned_on or node.name in profile.pinned_on)
    )


def _is_somewhere(nodes: Iterable[Node], node_id: str) -> bool:
    return any(
        node.status_of(node_id) in ("loading", "loaded", "recovering")
        for node in nodes
        if node.is_healthy
    )
