"""Which models have to leave a node for another one, and which never do; pure.

what holds a resident   until
pinned                  an operator unpins it
class                   never: the one that comes ranks lower
moving                  its load, unload or recovery has ended
dwell                   it has been there for ``[eviction] min_dwell_seconds``
busy                    the last of its requests has ended, and of those that are on their way to it

Equal classes may displace each other, in both directions: that is what swapping is. ``lru`` takes
first what nobody has used for the longest time, ``priority`` the lowest class first and the least
recently used within it; both take no more than is needed. What is closing already goes first, so
that a choice that has been made stays made while it waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal, Self

from cortex.gateway.catalogue import DEFAULT_CLASS, Profile
from cortex.gateway.config import Eviction
from cortex.gateway.fleet import FleetSnapshot, Node, Place
from cortex.ipc.node_api import ModelInfo

Strategy = Literal["lru", "priority"]
Hold = Literal["pinned", "class", "moving", "dwell", "busy"]
FOR_GOOD: AbstractSet[Hold] = frozenset({"pinned", "class"})

NEVER = float("-inf")


@dataclass(frozen=True)
class Rules:
    """What the operator wrote of residency, and what is under way."""

    strategy: Strategy = "lru"
    min_dwell_seconds: float = 0.0
    classes: Mapping[str, int] = field(default_factory=dict)
    """Residency classes by a model's name on nodes; what is not there has the default."""
    arriving: Mapping[Place, int] = field(default_factory=dict)
    """Requests that a load has just been finished for, and that are not at the node yet."""
    closing: AbstractSet[Place] = frozenset()
    """Places that get no new requests, because somebody waits for their memory."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What clients call models, by their names on nodes, where that differs."""

    @classmethod
    def of(
        cls,
        written: Eviction,
        profiles: Iterable[Profile],
        *,
        arriving: Mapping[Place, int],
        closing: AbstractSet[Place],
    ) -> Self:
        """Return what is *written*, and what is under way."""
        known = list(profiles)
        return cls(
            strategy=written.strategy,
            min_dwell_seconds=written.min_dwell_seconds,
            classes={profile.node_id: profile.residency_class for profile in known},
            arriving=arriving,
            closing=closing,
            names={profile.node_id: profile.id for profile in known},
        )

    def class_of(self, model_id: str) -> int:
        """Return the residency class of a model, by its name on nodes."""
        return self.classes.get(model_id, DEFAULT_CLASS)


@dataclass(frozen=True)
class Resident:
    """A model that holds memory of a node, in MB by device, and what keeps it there, if anything.

    ``free_at`` is when its dwell is over.
    """

    place: Place
    residency_class: int
    held_mb: Mapping[int, int]
    last_used: float
    hold: Hold | None
    free_at: float = NEVER
    is_closing: bool = False
    name: str = ""
    """What clients call it."""

    @property
    def stays_for_good(self) -> bool:
        """Whether no waiting helps."""
        return self.hold in FOR_GOOD


def residents(
    snapshot: FleetSnapshot,
    node: Node,
    incoming_class: int,
    rules: Rules,
    taken: AbstractSet[Place] = frozenset(),
) -> list[Resident]:
    """Return what holds memory of *node*, as a model of *incoming_class* sees it.

    *taken* are leaving for somebody else.
    """
    seen = _Beholder(snapshot, node, incoming_class, rules, taken)
    return [seen.resident(model) for model in node.models if model.status != "failed"]


@dataclass(frozen=True)
class _Beholder:
    """A model of some class that looks at what a node has loaded."""

    snapshot: FleetSnapshot
    node: Node
    own_class: int
    rules: Rules
    taken: AbstractSet[Place]

    def resident(self, model: ModelInfo) -> Resident:
        place = (self.node.name, model.id)
        loaded_at = self.snapshot.loaded_at.get(place, NEVER)
        free_at = loaded_at + self.rules.min_dwell_seconds
        return Resident(
            place,
            self.rules.class_of(model.id),
            held_mb(model),
            max(self.snapshot.last_used.get(place, NEVER), loaded_at),
            self._hold(model, place, free_at),
            free_at,
            place in self.rules.closing,
            self.rules.names.get(model.id, model.id),
        )

    def _hold(self, model: ModelInfo, place: Place, free_at: float) -> Hold | None:
        if place in self.snapshot.pinned:
            return "pinned"
        if self.own_class < self.rules.class_of(model.id):
            return "class"
        if place in self.taken or model.status != "loaded":
            return "moving"
        if self.snapshot.now < free_at:
            return "dwell"
        is_busy = self.snapshot.load_of(self.node, model.id) or self.rules.arriving.get(place)
        return "busy" if is_busy else None


def held_mb(model: ModelInfo) -> dict[int, int]:
    """Return what a model holds on each of its devices, in MB."""
    return {held.index: held.weights_mb + held.kv_mb + held.workspace_mb for held in model.devices}


def victims(
    displaceable: Iterable[Resident], missing_mb: Mapping[int, int], strategy: Strategy
) -> tuple[Resident, ...] | None:
    """Return whom to unload so that *missing_mb* becomes free on each device, or None.

    In the order of the strategy, and without anybody who could as well stay.
    """
    useful = [r for r in displaceable if any(r.held_mb.get(device) for device in missing_mb)]
    chosen: list[Resident] = []
    for resident in sorted(useful, key=lambda r: _turn_to_go(r, strategy)):
        if _suffices(chosen, missing_mb):
            break
        chosen.append(resident)
    if not _suffices(chosen, missing_mb):
        return None
    for resident in reversed(chosen[:]):
        without = [other for other in chosen if other is not resident]
        if _suffices(without, missing_mb):
            chosen = without
    return tuple(chosen)


def _turn_to_go(resident: Resident, strategy: Strategy) -> tuple[bool, int, float, Place]:
    rank = resident.residency_class if strategy == "priority" else 0
    return not resident.is_closing, rank, resident.last_used, resident.place


def _suffices(chosen: Sequence[Resident], missing_mb: Mapping[int, int]) -> bool:
    return all(
        sum(resident.held_mb.get(device, 0) for resident in chosen) >= mb
        for device, mb in missing_mb.items()
    )


def harm(chosen: Sequence[Resident]) -> tuple[bool, int, int, float]:
    """Return how bad it is that *chosen* go, comparable: nothing is least."""
    return (
        not all(resident.is_closing for resident in chosen),
        max((resident.residency_class for resident in chosen), default=-1),
        len(chosen),
        max((resident.last_used for resident in chosen), default=NEVER),
    )
