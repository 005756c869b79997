"""What a model finds on one node: free memory, and whom it could displace; pure.

free          as the node says, less what others on their way there will still take
in the end    what would be free if everything went that is not held for good

Devices that share a model are a group, and a device is in one group only: a model that shares some
of them with others has to go, however little it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from cortex.gateway.eviction import Hold, Resident, Rules, held_mb, residents, victims
from cortex.gateway.fleet import FleetSnapshot, Node, Place
from cortex.ipc.fleet_api import Fits

ORDER: tuple[Fits, ...] = ("now", "after_evicting", "after_waiting", "no", "away", "never")
"""The best first."""

GOING: tuple[tuple[Fits, tuple[Hold | None, ...]], ...] = (
    ("after_evicting", (None,)),
    ("after_waiting", (None, "dwell", "busy")),
)
"""What it comes to where victims are held by no more than this."""

UNMEASURED_MB = 2**40
"""What a model that is just being loaded may hold: more than anybody waits for."""

Phase = Literal["waiting", "clearing", "loading"]


@dataclass(frozen=True)
class Claim:
    """Memory that is spoken for, in MB by device of one node, for a model on its way there.

    waiting    its victims still work; what they will free goes to it, and the rest from the free
    clearing   its victims are being unloaded: nothing else is placed on these devices
    loading    it fills, up to all it wants, which may be more than there is; what has gone from
               ``accounted_mb``, which is what was free or held by loaded models when it began, it
               has taken already
    """

    place: Place
    residency_class: int
    phase: Phase
    shares_mb: Mapping[int, int]
    victims: tuple[Resident, ...] = ()
    accounted_mb: Mapping[int, int] = field(default_factory=dict)

    def left_mb(self, device: int) -> int:
        """Return what it will take of what is free on *device*, if it has not begun to load."""
        share = self.shares_mb.get(device, 0)
        if self.phase == "waiting":
            return max(0, share - sum(v.held_mb.get(device, 0) for v in self.victims))
        return share


@dataclass(frozen=True)
class Group:
    """Devices of one node that would hold a model together, and what it finds there."""

    devices: tuple[int, ...]
    fits: Fits
    victims: tuple[Resident, ...] = ()


@dataclass(frozen=True)
class Ground:
    """One node with everything that counts for one model: read once, asked for each group."""

    free_mb: Mapping[int, int | None]
    """By device that is ready, less what is spoken for."""
    in_the_end_mb: Mapping[int, int]
    """What would be free if everything went that is not held for good."""
    residents: tuple[Resident, ...]
    rules: Rules
    cleared: AbstractSet[int] = frozenset()
    """Devices that are being cleared for somebody else."""

    def group(
        self, devices: tuple[int, ...], share_mb: int | None, *, may_evict: bool = True
    ) -> Group:
        """Return how a model whose devices have to hold *share_mb* each would fit there."""
        crossing = [r for r in self.residents if crosses(r.held_mb, devices)]
        if any(resident.stays_for_good for resident in crossing):
            return Group(devices, "no")
        missing = {
            device: share_mb - free
            for device in devices
            if share_mb is not None and (free := self.free_mb[device]) is not None
            if free < share_mb
        }
        is_enough = all(self.in_the_end_mb[device] >= (share_mb or 0) for device in missing)
        if not self.cleared.isdisjoint(devices):
            return Group(devices, "after_waiting" if is_enough else "no")
        if not missing and not crossing:
            return Group(devices, "now")
        if not may_evict:
            return Group(devices, "no")
        for fits, holds in GOING:
            if (chosen := self._victims(crossing, missing, holds)) is not None:
                return Group(devices, fits, chosen)
        return Group(devices, "after_waiting" if is_enough else "no")

    def _victims(
        self,
        crossing: Sequence[Resident],
        missing_mb: Mapping[int, int],
        holds: Collection[Hold | None],
    ) -> tuple[Resident, ...] | None:
        """Return *crossing* and whom else to unload; None where more than *holds* keeps them."""
        if any(resident.hold not in holds for resident in crossing):
            return None
        others = [r for r in self.residents if r.hold in holds and r not in crossing]
        left = {
            device: mb - sum(resident.held_mb.get(device, 0) for resident in crossing)
            for device, mb in missing_mb.items()
        }
        still = {device: mb for device, mb in left.items() if mb > 0}
        chosen = victims(others, still, self.rules.strategy)
        return None if chosen is None else (*crossing, *chosen)


def ground(
    snapshot: FleetSnapshot,
    node: Node,
    own_class: int,
    rules: Rules,
    claims: Collection[Claim],
) -> Ground:
    """Return what a model of class *own_class* finds on *node*."""
    here = _coming(node, claims)
    taken = frozenset(victim.place for claim in here for victim in claim.victims)
    held = residents(snapshot, node, own_class, rules, taken)
    stronger = [claim for claim in here if claim.residency_class > own_class]
    filled = _filled(node, here)
    in_the_end: dict[int, int] = {}
    for device, mb in read_mb(node).items():
        in_the_end[device] = 0
        if mb is None:
            continue
        leaving = sum(r.held_mb.get(device, 0) for r in held if not r.stays_for_good)
        leaving += UNMEASURED_MB if any(_is_filling(r) for r in held) else 0
        staying = sum(claim.shares_mb.get(device, 0) for claim in stronger)
        in_the_end[device] = mb + leaving + filled[device] - staying
    cleared = {d for claim in here if claim.phase == "clearing" for d in claim.shares_mb}
    return Ground(_unclaimed_mb(node, here), in_the_end, tuple(held), rules, cleared)


def has_room(node: Node, claim: Claim, others: Collection[Claim]) -> bool:
    """Whether what is free on *node*, and not what *others* are to take, suffices for *claim*."""
    if any(crosses(held_mb(m), claim.shares_mb) for m in node.models if m.status != "failed"):
        return False
    free = _unclaimed_mb(node, _coming(node, others))
    return all((free.get(device) or 0) >= mb for device, mb in claim.shares_mb.items())


def crosses(some: Collection[int], others: Collection[int]) -> bool:
    """Whether two groups of devices share some, and not all, of them."""
    is_shared = len(some) > 1 and len(others) > 1 and not set(some).isdisjoint(others)
    return is_shared and set(some) != set(others)


def _coming(node: Node, claims: Collection[Claim]) -> list[Claim]:
    """Return those of *claims* whose model is on its way to *node*."""
    return [
        claim
        for claim in claims
        if claim.place[0] == node.name and node.status_of(claim.place[1]) != "loaded"
    ]


def _unclaimed_mb(node: Node, coming: Collection[Claim]) -> dict[int, int | None]:
    """Return what is free on each device, less what *coming* will still take; None: unread."""
    filled = _filled(node, coming)
    return {
        device: None
        if mb is None
        else mb + filled[device] - sum(claim.left_mb(device) for claim in coming)
        for device, mb in read_mb(node).items()
    }


def _is_filling(resident: Resident) -> bool:
    """Whether it takes memory that nobody has measured yet, and may go when it has it."""
    return resident.hold == "moving" and not any(resident.held_mb.values())


def _filled(node: Node, coming: Collection[Claim]) -> dict[int, int]:
    """Return what those of *coming* that load hold by now, together, by device that is read.

    It is what is neither free nor held by loaded models and was one of the two when a load began.
    Whose it is cannot be told, and what a load that has ended since had taken before that is
    missing: so it is rather too little.
    """
    loading = [claim for claim in coming if claim.phase == "loading"]
    return {
        device: min(
            sum(claim.shares_mb.get(device, 0) for claim in loading),
            max([0, *(claim.accounted_mb.get(device, 0) - mb for claim in loading)]),
        )
        for device, mb in accounted_mb(node).items()
    }


def accounted_mb(node: Node) -> dict[int, int]:
    """Return what is free or held by loaded models on each device of *node*, where that is read."""
    held = [held_mb(model) for model in node.models if model.status == "loaded"]
    return {
        device: mb + sum(model.get(device, 0) for model in held)
        for device, mb in read_mb(node).items()
        if mb is not None
    }


def read_mb(node: Node) -> dict[int, int | None]:
    """Return the free memory of each device of *node* that is ready, as it says; None: unread."""
    devices = node.health.devices if node.health else []
    return {
        device.index: device.vram_free_mb if device.loadable_mb is None else device.loadable_mb
        for device in devices
        if device.state == "ready"
    }
