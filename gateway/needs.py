"""What a model takes on each node that may get it: remembered, asked for, or written down.

    measured    by the node, or ``footprints.py``: what it has held on such devices before
    estimate    the node's answer to ``POST /models/estimate``; nodes of older versions have none
    profile     ``vram_mb``
    unknown     the node says when it is asked to load: ``learnt`` from its refusal

The least a model can live with is only ever the node's to say; it is kept for who asks which nodes
could hold the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from cortex.gateway.catalogue import Profile
from cortex.gateway.errors import Relayed
from cortex.gateway.fleet import Node, Place
from cortex.gateway.footprints import Footprints
from cortex.gateway.placement import Incoming, Need
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import Discovery, LoadEstimate

NO_MEMORY = "insufficient_memory"


class Needs:
    """Asks nodes, all at the same time."""

    def __init__(self, client: NodeClient, footprints: Footprints) -> None:
        self._client = client
        self._footprints = footprints
        self._least: dict[Place, tuple[Profile, Discovery | None, int]] = {}

    def known(self, node: Node, profile: Profile) -> Need:
        """Return what is known without asking the node."""
        return need_of(self._measured_mb(node, profile), LoadEstimate(), profile)

    def least_mb(self, node: Node, profile: Profile) -> int | None:
        """Return the least the model can live with, as *node* has said of these very devices."""
        of, on, mb = self._least.get((node.name, profile.node_id), (None, None, None))
        return mb if (of, on) == (profile, node.discovery) else None

    def note(self, node: Node, profile: Profile, need: Need) -> None:
        """Remember what *node* has said."""
        if need.least_mb is not None:
            place = node.name, profile.node_id
            self._least[place] = profile, node.discovery, need.least_mb

    def _measured_mb(self, node: Node, profile: Profile) -> int | None:
        """Return what it has held; never more than such devices have, for it was on them."""
        measured = self._footprints.of(node, profile.node_id, profile)
        if measured is None or node.discovery is None:
            return measured
        largest = max((device.vram_total_mb for device in node.discovery.devices), default=0)
        return min(measured, profile.device_count * largest)

    async def of(self, nodes: Iterable[Node], incoming: Incoming) -> dict[str, Need]:
        """Return what the model takes on those of *nodes* that may get it and are not asked yet."""
        profile = incoming.profile
        asked = [
            node
            for node in nodes
            if node.takes_loads and node.name not in incoming.excluded | incoming.needs.keys()
            if incoming.only in (None, node.name)
            if not profile.pinned_on or node.name in profile.pinned_on
        ]
        found = await asyncio.gather(*(self._of(node, profile) for node in asked))
        for node, need in zip(asked, found, strict=True):
            self.note(node, profile, need)
        return {node.name: need for node, need in zip(asked, found, strict=True)}

    async def _of(self, node: Node, profile: Profile) -> Need:
        measured = self._measured_mb(node, profile)
        try:
            estimate = await self._estimate(node, profile)
        except Relayed as error:
            if error.status != 422:
                estimate = LoadEstimate()
            elif (least_mb := least_in(error)) is not None:
                estimate = LoadEstimate(least_mb=least_mb)
            else:
                return Need(refusal=error)
        except (ApiError, msgspec.DecodeError, RecursionError):
            estimate = LoadEstimate()
        return need_of(measured, estimate, profile)

    async def _estimate(self, node: Node, profile: Profile) -> LoadEstimate:
        body = msgspec.json.encode(profile.load_request())
        answer = await self._client.control(node, "POST /models/estimate", body)
        return msgspec.json.decode(answer, type=LoadEstimate)


def need_of(measured_mb: int | None, estimate: LoadEstimate, profile: Profile) -> Need:
    """Return what is to be believed; *estimate* is empty where the node has not made one."""
    least = estimate.least_mb
    if estimate.is_measured and estimate.wanted_mb is not None:
        # Ours may be of a time when there was no room for all of its KV cache.
        wanted = max(estimate.wanted_mb, least or 0)
        return Need(wanted, "measured", least, least_source="measured")
    if measured_mb is not None:
        return Need(max(measured_mb, least or 0), "measured", least)
    if estimate.wanted_mb is not None or least is not None:
        return Need(max(estimate.wanted_mb or 0, least or 0), "estimate", least)
    return Need(profile.vram_mb, "profile") if profile.vram_mb else Need()


def least_in(error: ApiError) -> int | None:
    """Return the least a model needs, in MB, where *error* is a node's refusal that tells it.

    The numbers are of one device, of as many as the refusal says.
    """
    extras = error.extras
    if extras.get("kind") != NO_MEMORY:
        return None
    parts = [extras.get(f"{part}_bytes") for part in ("weights", "kv", "workspace")]
    counted = [part for part in parts if isinstance(part, int)]
    ranks = extras.get("ranks")
    devices = ranks if isinstance(ranks, int) else 1
    return devices * -(-sum(counted) >> 20) if counted else None


def learnt(need: Need, error: ApiError) -> Need | None:
    """Return what a refusal teaches beyond *need*, or None where it teaches nothing."""
    least_mb = least_in(error)
    if least_mb is None or least_mb <= (need.smallest_mb or 0):
        return None
    return Need(max(need.mb or 0, least_mb), "estimate", least_mb)
