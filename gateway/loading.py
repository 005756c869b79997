"""What is done to nodes so that a model is loaded or gone; what is to be done others decide.

    clear      unload the victims one by one, and look before each: what is free may suffice
    ask        POST /models/load
    follow     poll until the node says that it is loaded

A node that is told to unload and does not answer in time goes on with it: it is looked at until the
model is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog

from cortex.gateway.demands import Demand
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.metrics import Metrics
from cortex.gateway.needs import learnt, least_in
from cortex.gateway.placement import Need
from cortex.gateway.poller import Poller
from cortex.gateway.room import Claim
from cortex.gateway.upstream import NodeClient
from cortex.gateway.written import Written
from cortex.ipc.errors import ApiError, NodeFailed, NodeTimeout, Overloaded, Unloadable
from cortex.ipc.node_api import ModelInfo, UnloadRequest

BUSY_SECONDS = 2

log = structlog.get_logger()


class NodeWentDown(NodeFailed):
    """The node is away, or has been; another one may have the model."""


class LoadFailed(NodeFailed):
    """The node has said why the model does not load; so would others, as far as we know."""


class TooSlow(NodeTimeout):
    """The load has taken as long as a load may."""


class StillBusy(Overloaded):
    """Something has to end first: requests for what was to make room, or an unload."""


class Loading:
    """Loads and unloads, one call each."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        poller: Poller,
        client: NodeClient,
        metrics: Metrics,
        written: Written,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._client = client
        self._metrics = metrics
        self._written = written

    async def unload(self, node: Node, model: str, *, force: bool, reason: str) -> None:
        """Return once *model*, by its name there, is gone; raise what the node refuses with."""
        body = msgspec.json.encode(UnloadRequest(model, force=force))
        try:
            await self._client.control(node, "POST /models/unload", body)
        except NodeTimeout:
            await self._until_gone(node, model)
        await self._poller.refresh(node.name)
        public = self._written.catalogue.public_id(model)
        self._metrics.evictions.labels(public, node.name, reason).inc()
        log.info("model unloaded", model=model, node=node.name, reason=reason)

    async def _until_gone(self, node: Node, model: str) -> None:
        loop, timeouts = asyncio.get_running_loop(), self._written.timeouts
        until = loop.time() + timeouts.load_seconds
        while loop.time() < until:
            await self._poller.refresh(node.name)
            seen = self._fleet.node(node.name)
            status = seen.status_of(model)
            if not seen.failures and status is None:
                return
            if not seen.is_healthy or (not seen.failures and status != "unloading"):
                break
            await asyncio.sleep(timeouts.poll_while_loading_seconds)
        raise NodeTimeout(f"node {node.name} did not unload {model!r} in time")

    async def clear(self, claim: Claim, has_room: Callable[[Claim], bool]) -> None:
        """Unload the victims of *claim* until there is room; raise what the node refuses with."""
        name = claim.place[0]
        await self._poller.refresh(name)
        for victim in claim.victims:
            node = self._fleet.node(name)
            if has_room(claim) or node.model(victim.place[1]) is None:
                continue
            try:
                await self.unload(node, victim.place[1], force=False, reason="displaced")
            except ApiError as error:
                await self._poller.refresh(name)
                if error.code != "model_not_found":
                    raise still_busy(error) from error

    async def ask(self, node: Node, demand: Demand, devices: tuple[int, ...]) -> None:
        """Have *node* begin to load; it may be loaded already.

        Raise what it refuses with, once what is known of it is from after that.
        """
        assert demand.target.profile is not None
        request = demand.target.profile.load_request()
        there = node.health.devices if node.health else []
        if request.devices is None and 0 < len(devices) < len(there):
            request = msgspec.structs.replace(request, devices=list(devices))
        try:
            await self._client.control(node, "POST /models/load", msgspec.json.encode(request))
        except ApiError as error:
            if error.code != "loaded_differently":
                await self._poller.refresh(node.name)
                raise still_busy(error) from error
            log.info("model is there otherwise", model=demand.target.id, node=node.name)
        self._metrics.cold_starts.labels(demand.target.id, node.name).inc()

    async def follow(self, demand: Demand, name: str) -> None:
        """Return once node *name* says that the model is loaded; raise where it never will be."""
        model, before = demand.target.node_id, self._fleet.node(name)
        while True:
            await self._poller.refresh(name)
            node = self._fleet.node(name)
            if not node.is_healthy:
                raise NodeWentDown(f"node {name} went down while loading {demand.target.id!r}")
            if not node.failures:  # else what we know is from before the load
                info = node.model(model)
                demand.progress = info.progress if info else None
                status = node.status_of(model)
                if status == "loaded":
                    return
                if status is None and node.has_begun_anew(before):
                    raise NodeWentDown(f"node {name} restarted while loading {demand.target.id!r}")
                if status in ("failed", None):
                    raise _failure(demand.target.id, name, info)
            await asyncio.sleep(self._written.timeouts.poll_while_loading_seconds)


def _failure(model: str, node: str, info: ModelInfo | None) -> ApiError:
    """Return why a load has failed: as its refusal at once would have been, or LoadFailed."""
    why = info.failure if info else "it is gone"
    words = f"{model!r} could not be loaded on {node}: {why}"
    if info is None or info.refusal is None:
        return LoadFailed(words)
    return Unloadable(words, kind=info.refusal.kind, **info.refusal.facts)


def still_busy(error: ApiError) -> ApiError:
    """Return *error* of a node, or StillBusy where it is the state of a model that forbids it."""
    if error.code != "conflict":
        return error
    return StillBusy(str(error), retry_after_seconds=BUSY_SECONDS)


def what_now(
    error: ApiError, need: Need, *, has_room: bool
) -> Need | Literal["again", "elsewhere", "answer"]:
    """Return what follows a load that ended with *error*, where *need* was thought to be enough.

    A Need: place it again with that. ``again``: a victim has become busy, or somebody else has
    taken the memory; *has_room* tells whether it is still free. ``elsewhere``: this node cannot
    have it. ``answer``: neither can another, or nobody knows better.
    """
    if isinstance(error, (LoadFailed, TooSlow)):
        return "answer"
    if (learned := learnt(need, error)) is not None:
        return learned
    is_overtaken = least_in(error) is not None and not has_room
    if isinstance(error, StillBusy) or is_overtaken:
        return "again"
    if error.status in (502, 503, 504) or least_in(error) is not None:
        return "elsewhere"
    return "answer"
