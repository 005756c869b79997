"""Which node gets a model that nobody has loaded, and what has to leave it first; pure.

    what it needs      measured by us > the node's estimate > ``vram_mb`` > unknown: the node says
    what a node has    free memory of each device, less what loads on their way will still take
    a group            as many devices as the model needs; each has to hold its share

Of the nodes that could hold it at all, the best is the one where it fits without evicting anything,
then where what has to go is missed least, then where idle models do not suffice and busy ones are
waited for. Among equals: where an operator has pinned it, where most is free, by name. Where all of
what a model wants cannot be had, the least it can live with will do.

Every candidate keeps its numbers, so that a refusal (``refusal.py``) can show the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import combinations, islice

from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.eviction import Resident, Rules, harm
from cortex.gateway.fleet import FleetSnapshot, Node, Place
from cortex.gateway.room import ORDER, Claim, Ground, Group, ground
from cortex.ipc.errors import ApiError
from cortex.ipc.fleet_api import Fits, Source
from cortex.ipc.node_api import DeviceInfo

GROUPS = 256
"""Groups of devices that are looked at, the emptiest first."""


@dataclass(frozen=True)
class Need:
    """What a model takes on a node, in MB on all its devices together; None: nobody knows.

    ``least_mb`` is what it can live with, as the node says. ``refusal`` is why the node would not
    have it at all.
    """

    mb: int | None = None
    source: Source = "unknown"
    least_mb: int | None = None
    refusal: ApiError | None = None
    least_source: Source = "estimate"

    @property
    def smallest_mb(self) -> int | None:
        """What has to fit in any case."""
        return self.mb if self.least_mb is None else self.least_mb

    @property
    def smallest_source(self) -> Source:
        """Who says so."""
        return self.source if self.least_mb is None else self.least_source


@dataclass(frozen=True)
class Incoming:
    """A model that somebody waits for; ``since`` when, by ``FleetSnapshot.now``."""

    target: Target
    profile: Profile
    needs: Mapping[str, Need] = field(default_factory=dict)
    """By node."""
    since: float = 0.0
    excluded: AbstractSet[str] = frozenset()
    """Nodes that have just failed it."""
    only: str | None = None
    """The one node it may go to."""
    may_evict: bool = True

    @property
    def node_id(self) -> str:
        """Its name on nodes."""
        return self.target.node_id


@dataclass(frozen=True)
class Candidate:
    """One node, as a model finds it."""

    node: Node
    fits: Fits
    why: str
    need: Need = Need()
    devices: tuple[int, ...] = ()
    share_mb: int | None = None
    victims: tuple[Resident, ...] = ()
    free_mb: int | None = None
    """On all its devices that are ready; None where one cannot be read."""
    reclaimable_mb: int = 0
    """Held by models that could go at once."""

    @property
    def shares_mb(self) -> dict[int, int]:
        """What each device has to hold."""
        return dict.fromkeys(self.devices, self.share_mb or 0)

    @property
    def wanted_mb(self) -> dict[int, int]:
        """What it takes of each device where that is there: at least its share."""
        each = -(-(self.need.mb or 0) // max(len(self.devices), 1))
        return {device: max(share, each) for device, share in self.shares_mb.items()}


def candidates(
    snapshot: FleetSnapshot, incoming: Incoming, rules: Rules, claims: Collection[Claim] = ()
) -> list[Candidate]:
    """Return every node that loads models, the best first."""
    nodes = [node for node in snapshot.nodes if not node.is_engine]
    found = [_candidate(snapshot, node, incoming, rules, claims) for node in nodes]
    return sorted(found, key=lambda c: _rank(c, (c.node.name, incoming.node_id), snapshot))


def _rank(candidate: Candidate, place: Place, snapshot: FleetSnapshot) -> tuple[object, ...]:
    return (
        ORDER.index(candidate.fits),
        harm(candidate.victims),
        place not in snapshot.pinned,
        -(candidate.free_mb or 0),
        candidate.node.name,
    )


def _candidate(
    snapshot: FleetSnapshot,
    node: Node,
    incoming: Incoming,
    rules: Rules,
    claims: Collection[Claim],
) -> Candidate:
    need = incoming.needs.get(node.name, Need())
    if why := _never(node, incoming, need):
        return Candidate(node, "never", why, need)
    if why := _away(node, incoming):
        return Candidate(node, "away", why, need)
    profile = incoming.profile
    there = ground(snapshot, node, profile.residency_class, rules, claims)
    devices = [index for index in _fitting(node, profile) if index in there.free_mb]
    idle = [resident for resident in there.residents if resident.hold is None]
    seen = Candidate(
        node,
        "no",
        "",
        need,
        free_mb=_total(there.free_mb),
        reclaimable_mb=sum(sum(resident.held_mb.values()) for resident in idle),
    )
    status = node.status_of(incoming.node_id)
    if status in ("loading", "loaded", "unloading", "recovering"):
        return replace(seen, fits="after_waiting", why=f"it is {status} there")
    if len(devices) < profile.device_count:
        why = f"{len(devices)} devices are ready, it needs {profile.device_count}"
        is_passing = len(devices) + _coming(node, profile) >= profile.device_count
        return replace(seen, fits="after_waiting" if is_passing else "no", why=why)
    best, share = _best_group(there, devices, incoming, need)
    chosen = replace(
        seen, fits=best.fits, devices=best.devices, share_mb=share, victims=best.victims
    )
    return replace(chosen, why=_why(chosen, there))


def _never(node: Node, incoming: Incoming, need: Need) -> str | None:
    """Return why *node* could not hold the model even if it were empty."""
    profile = incoming.profile
    if incoming.only not in (None, node.name):
        return f"it is to go to {incoming.only}"
    if need.refusal is not None:
        return str(need.refusal)
    return _unfit(node, profile, need)


def could_hold(node: Node, profile: Profile, least_mb: int | None = None) -> bool:
    """Whether *node* could have the model if it were empty; one that was never reached could.

    *least_mb* is what the node has said that the model needs.
    """
    declared = Need(profile.vram_mb, "profile", least_mb)
    return not node.is_engine and _unfit(node, profile, declared) is None


def _unfit(node: Node, profile: Profile, need: Need) -> str | None:
    if profile.pinned_on and node.name not in profile.pinned_on:
        return f"it may run on {', '.join(profile.pinned_on)} only"
    return _too_small(node, profile, need) if node.discovery else None


def _too_small(node: Node, profile: Profile, need: Need) -> str | None:
    able = sorted(_totals(node, profile), reverse=True)
    if len(able) < profile.device_count:
        of_size = f" of {profile.min_device_vram_mb} MB" if profile.min_device_vram_mb else ""
        return f"it has {len(able)} devices{of_size}, {profile.device_count} are needed"
    share = _share(_certain_mb(need, profile), profile)
    if share is not None and able[profile.device_count - 1] < share:
        largest = able[profile.device_count - 1]
        return f"each of {profile.device_count} devices must hold {share} MB, and one has {largest}"
    return None


def _certain_mb(need: Need, profile: Profile) -> int | None:
    """Return what it needs in any case: its KV cache is never smaller than was asked for."""
    known = [mb for mb in (need.smallest_mb, profile.kv_cache_mb) if mb is not None]
    return max(known, default=None)


def _away(node: Node, incoming: Incoming) -> str | None:
    if not node.takes_loads:
        return f"it is {'draining' if node.is_healthy and node.breaker != 'open' else 'down'}"
    return "it has just failed" if node.name in incoming.excluded else None


def _suitable(device: DeviceInfo, profile: Profile) -> bool:
    if profile.devices is not None and device.index not in profile.devices:
        return False
    return device.vram_total_mb >= (profile.min_device_vram_mb or 0)


def _totals(node: Node, profile: Profile) -> list[int]:
    assert node.discovery is not None
    return [d.vram_total_mb for d in node.discovery.devices if _suitable(d, profile)]


def _fitting(node: Node, profile: Profile) -> list[int]:
    """Return the devices that may hold the model, full or not; what is not known may."""
    if node.discovery is not None:
        return [d.index for d in node.discovery.devices if _suitable(d, profile)]
    known = [device.index for device in node.health.devices] if node.health else []
    return [index for index in known if profile.devices is None or index in profile.devices]


def _coming(node: Node, profile: Profile) -> int:
    """Return how many devices that may hold the model will be ready in a moment."""
    starting = {
        device.index
        for device in (node.health.devices if node.health else [])
        if device.state in ("starting", "restarting")
    }
    return len(starting.intersection(_fitting(node, profile)))


def _total(free_mb: Mapping[int, int | None]) -> int | None:
    read = [max(0, mb) for mb in free_mb.values() if mb is not None]
    return sum(read) if len(read) == len(free_mb) else None


def _share(mb: int | None, profile: Profile) -> int | None:
    """Return what each of its devices holds of *mb*."""
    return None if mb is None else -(-mb // profile.device_count)


def _best_group(
    there: Ground, devices: Sequence[int], incoming: Incoming, need: Need
) -> tuple[Group, int | None]:
    """Return the best group and what each device of it holds: all it wants, else the least."""
    count = incoming.profile.device_count
    by_room = sorted(devices, key=lambda d: (-(there.free_mb[d] or 0), d))
    groups = [tuple(sorted(group)) for group in islice(combinations(by_room, count), GROUPS)]
    best: tuple[Group, int | None] | None = None
    for mb in dict.fromkeys((need.mb, need.smallest_mb)):
        share = _share(mb, incoming.profile)
        tried = [there.group(group, share, may_evict=incoming.may_evict) for group in groups]
        group = min(tried, key=lambda g: (ORDER.index(g.fits), harm(g.victims)))
        if best is None or ORDER.index(group.fits) < ORDER.index(best[0].fits):
            best = group, share
        if group.fits in ("now", "after_evicting"):
            break
    assert best is not None
    return best


def _asks(need: Need, share: int, candidate: Candidate) -> str:
    wanted = -(-(need.mb or 0) // max(len(candidate.devices), 1))
    if share >= wanted:
        return f"{share} MB ({need.source})"
    return f"at least {share} MB ({need.smallest_source}), better {wanted} MB ({need.source}),"


def _why(candidate: Candidate, there: Ground) -> str:
    need, share = candidate.need, candidate.share_mb
    free = {device: there.free_mb[device] for device in candidate.devices}
    has = ", ".join(f"{'?' if mb is None else max(mb, 0)} MB" for mb in free.values())
    if share is None:
        return f"{has} free, and nobody knows what it needs"
    asks = _asks(need, share, candidate) + (" on each device" if len(free) > 1 else "")
    said = f"{asks} of {has} free"
    names = ", ".join(victim.name for victim in candidate.victims)
    match candidate.fits:
        case "now":
            return said
        case "after_evicting":
            return f"{said}, once {names} has gone"
        case "after_waiting":
            return f"{said}, once {names or 'what is on its way'} may go"
        case _:
            holds = [f"{r.name} stays ({r.hold})" for r in there.residents if r.hold]
            return "; ".join([said, *holds])
