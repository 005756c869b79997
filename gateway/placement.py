"""Which node gets a model that nobody has loaded; pure.

The rule of this version: of the nodes that take requests and that the profile allows, the one with
the most free memory; ties by name. Whether the model fits is the node's to say, and its refusal,
with its numbers, is passed on.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cortex.gateway.catalogue import Profile
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.routing import NOBODY
from cortex.ipc.errors import Recovering


@dataclass(frozen=True)
class Placement:
    """Where a model goes, and why there."""

    node: Node
    reason: str


def place(
    snapshot: FleetSnapshot, profile: Profile, excluded: AbstractSet[str] = NOBODY
) -> Placement:
    """Return the node for *profile*; raise Recovering where no allowed node is up."""
    allowed = [
        node for node in snapshot.nodes if not profile.pinned_on or node.name in profile.pinned_on
    ]
    able = [node for node in allowed if node.takes_requests and node.name not in excluded]
    if not able:
        names = ", ".join(node.name for node in allowed)
        raise Recovering(
            f"{profile.id!r} may run on {names}, and none of them takes requests now",
            retry_after_seconds=3,
        )
    best = min(able, key=lambda node: (-node.free_mb, node.name))
    return Placement(best, f"most free memory: {best.free_mb} MB")
