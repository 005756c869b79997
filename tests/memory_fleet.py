"""Fleets for tests of placement: devices of some size, and models that hold some of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.fleet import FleetSnapshot, Node, Place
from cortex.gateway.placement import Incoming, Need
from cortex.ipc.node_api import (
    DeviceHealth,
    DeviceInfo,
    Discovery,
    Health,
    ModelDevice,
    ModelInfo,
    ModelLoad,
    Servable,
)

NOW = 1000.0


def a_node(
    name: str = "a",
    totals_mb: Sequence[int] = (1000,),
    held: Mapping[str, Sequence[int]] | None = None,
    busy: Sequence[str] = (),
    *,
    states: Mapping[str, Any] | None = None,
    filling: Mapping[int, int] | None = None,
) -> Node:
    """Return a node that is up; *held* is what each model has on each device.

    *filling* is what loads that run have of each.
    """
    held = held or {}
    taken = filling or {}
    free = [
        total - sum(mb[i] for mb in held.values()) - taken.get(i, 0)
        for i, total in enumerate(totals_mb)
    ]
    health = Health(
        1.0,
        [DeviceHealth(i, f"cuda:{i}", "ready", vram_free_mb=mb) for i, mb in enumerate(free)],
        models=[ModelLoad(model, in_flight=int(model in busy)) for model in held],
    )
    models = [
        ModelInfo(
            model,
            "torch",
            (states or {}).get(model, "loaded"),
            [ModelDevice(i, weights_mb=mb) for i, mb in enumerate(shares) if mb],
            Servable(ok=True),
        )
        for model, shares in held.items()
    ]
    infos = [DeviceInfo(i, "GPU", total) for i, total in enumerate(totals_mb)]
    node = Node(name, f"http://{name}", discovery=Discovery(name, "Linux", "6", infos, ["torch"]))
    return node.answered(health, models, {}, now=1.0)


def a_fleet(
    *nodes: Node,
    used: Mapping[Place, float] | None = None,
    loaded: Mapping[Place, float] | None = None,
    pinned: Sequence[Place] = (),
) -> FleetSnapshot:
    """Return the fleet at ``NOW``; *used* and *loaded* are times of the places, else long ago."""
    return FleetSnapshot(
        nodes,
        {},
        now=NOW,
        loaded_at=dict(loaded or {}),
        last_used=dict(used or {}),
        pinned=frozenset(pinned),
    )


def incoming(model: str = "m", mb: int | None = None, **profile: Any) -> Incoming:
    """Return somebody who waits for *model*, which takes *mb* wherever it goes."""
    written = Profile(model, **profile)
    need = Need() if mb is None else Need(mb, "measured")
    return Incoming(Target(model, model, written), written, dict.fromkeys("abc", need))
