"""Makes a model ready, whatever that takes: acts on what ``routing`` decides.

    a request -> ready -> routing.decide ── Serve ──> its replica
                              │ Load, Wait
                           a demand (demands.py), the same one for everybody who wants the model,
                           in the queue for memory (memory_queue.py)

While a client waits, ``ready`` calls its heartbeat, which keeps its stream alive and tells it what
goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

from cortex.gateway.affinity import Session
from cortex.gateway.background import Background
from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.demands import Demand, Heartbeat, in_silence
from cortex.gateway.dry_run import view_of
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.footprints import Footprints
from cortex.gateway.loading import Loading
from cortex.gateway.memory_queue import MemoryQueue
from cortex.gateway.metrics import Metrics
from cortex.gateway.needs import Needs
from cortex.gateway.placement import Incoming, candidates
from cortex.gateway.poller import Poller
from cortex.gateway.refusal import refusal
from cortex.gateway.routing import NOBODY, Decision, Load, Refuse, Serve, Wait, decide, replicas
from cortex.gateway.upstream import NodeClient
from cortex.gateway.written import Written
from cortex.ipc.errors import ModelLoading, ModelNotFound, Overloaded
from cortex.ipc.fleet_api import PlacementView

ATTEMPTS = 3
"""How often a model may vanish again after a load before a request gives up."""
GOING_SECONDS = 5


class Lifecycle:
    """What requests and operators ask of models: be ready, be loaded, be gone."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        poller: Poller,
        client: NodeClient,
        background: Background,
        footprints: Footprints,
        metrics: Metrics,
        written: Written,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._written = written
        self._footprints = footprints
        self._needs = Needs(client, footprints)
        self._loading = Loading(
            fleet=fleet, poller=poller, client=client, metrics=metrics, written=written
        )
        self._queue = MemoryQueue(
            fleet=fleet,
            loading=self._loading,
            needs=self._needs,
            background=background,
            metrics=metrics,
            written=written,
        )
        self.wait = self._queue.wait
        self.closed = self._queue.closed
        fleet.watchers.append(self._measure)

    @property
    def loads(self) -> list[Demand]:
        """Every load that runs or waits for its turn."""
        return list(self._queue.demands.values())

    async def ready(
        self,
        target: Target,
        *,
        excluded: AbstractSet[str] = NOBODY,
        heartbeat: Heartbeat = in_silence,
        session: Session | None = None,
        patience_seconds: float | None = None,
    ) -> Serve:
        """Return the replica for a request of *session*, loading the model first if need be.

        Raise what ``decide`` refuses with, what the load failed with, or ModelLoading after
        *patience_seconds*.
        """
        await self._poller.first_round()
        since = self._fleet.now()
        until = _deadline(patience_seconds)
        reason = None
        has_looked_again = False
        for _ in range(ATTEMPTS):
            match self._decide(target, excluded, session, was_its_turn=reason is not None):
                case Serve(node, why):
                    return Serve(node, reason or why)
                case Refuse(error, node):
                    if node is None or has_looked_again:
                        raise error
                    has_looked_again = True
                    await self._poller.refresh(node.name)
                case Wait(node):
                    reason = "after-load"
                    running = self._queue.demands.get(target.node_id)
                    demand = running or self._queue.follow(target, node, since)
                    await self._queue.wait(demand, heartbeat, until)
                case Load():
                    reason = "loaded-on-demand"
                    demand = self._queue.join(target, since, excluded=excluded)
                    await self._queue.wait(demand, heartbeat, until)
        raise ModelLoading(f"{target.id!r} does not stay loaded", retry_after_seconds=5)

    def _decide(
        self,
        target: Target,
        excluded: AbstractSet[str],
        session: Session | None,
        *,
        was_its_turn: bool,
    ) -> Decision:
        """Return what to do; whose turn it was is served also where others wait for the memory."""
        closed = NOBODY if was_its_turn else self._queue.closed(target.node_id)
        decision = decide(self._fleet.snapshot(), target, excluded | closed, session)
        if not isinstance(decision, Refuse):
            return decision
        if decision.node is None and target.node_id in self._queue.demands:
            return Load()  # it is on its way to where it can be served
        if closed and target.profile is None:
            message = f"{target.id!r} makes room for another model, and is in no catalogue"
            return Refuse(Overloaded(message, retry_after_seconds=GOING_SECONDS))
        return decision

    def load_unless_loaded(
        self, target: Target, *, node: Node | None, may_evict: bool = True
    ) -> Demand | None:
        """Return the load of *target*, to *node* if given; None where it is loaded already.

        A load that runs already is returned, wherever it goes. Raise what is certain without asking
        a node what the model needs.
        """
        snapshot = self._fleet.snapshot()
        if target.node_id in self._queue.demands:
            return self._queue.join(target, snapshot.now, may_evict=may_evict, is_asked=True)
        where = [node.name] if node else [known.name for known in snapshot.nodes]
        if any(known.name in where for known in replicas(snapshot, target.node_id)):
            return None
        incoming = Incoming(target, _profile_of(target), only=node.name if node else None)
        found = candidates(snapshot, incoming, self._queue.rules(), self._queue.claims)
        if all(candidate.fits in ("away", "never") for candidate in found):
            raise refusal(incoming, found)
        return self._queue.join(
            target, snapshot.now, only=incoming.only, may_evict=may_evict, is_asked=True
        )

    async def unload(
        self, target: Target, *, node: str | None, force: bool, reason: str = "asked"
    ) -> list[str]:
        """Unload *target* wherever it is, or from *node*; return the names of those nodes.

        *reason* is for the metric: asked, idle or drained. What is asked for takes back a load too
        that waits for its turn.
        """
        was_waiting = reason == "asked" and self._queue.take_back(target.node_id, node)
        holding = [
            known
            for known in self._fleet.snapshot().nodes
            if known.status_of(target.node_id) and node in (None, known.name)
            if not known.is_engine
        ]
        if not (holding or was_waiting):
            raise ModelNotFound(f"no node has {target.id!r}", param="model")
        for known in holding:
            await self._loading.unload(known, target.node_id, force=force, reason=reason)
        return [known.name for known in holding]

    async def placement(self, target: Target) -> PlacementView:
        """Return where *target* would go now and what would have to go, or why it cannot.

        Nothing is done. Raise ModelNotFound for what is not in the catalogue.
        """
        await self._poller.first_round()
        profile = _profile_of(target)
        nodes = self._fleet.snapshot().nodes
        known = {node.name: self._needs.known(node, profile) for node in nodes}
        asked = await self._needs.of(nodes, Incoming(target, profile))
        snapshot = self._fleet.snapshot()
        incoming = Incoming(target, profile, known | asked, snapshot.now)
        found = candidates(snapshot, incoming, self._queue.rules(), self._queue.claims)
        there = [node.name for node in replicas(snapshot, target.node_id)]
        return view_of(incoming, found, there)

    def least_mb(self, node: Node, profile: Profile) -> int | None:
        """Return the least the model can live with on *node*, where the node has said it."""
        return self._needs.least_mb(node, profile)

    def _measure(self, name: str) -> None:
        catalogue = self._written.catalogue
        self._footprints.saw(
            self._fleet.node(name),
            lambda model: catalogue.profiles.get(catalogue.public_id(model)),
        )


def _profile_of(target: Target) -> Profile:
    if target.profile is None:
        raise ModelNotFound(f"{target.id!r} is not in the catalogue", param="model")
    return target.profile


def _deadline(patience_seconds: float | None) -> float | None:
    if patience_seconds is None:
        return None
    return asyncio.get_running_loop().time() + patience_seconds
