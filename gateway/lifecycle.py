"""Makes a model ready: acts on what ``routing`` decides.

A load belongs to the daemon, not to the request that asked for it: everybody who wants the model
waits for the same one, and a client that goes away stops waiting, not the load. While it waits,
``ready`` calls the caller's heartbeat, which keeps the client's stream alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
import structlog

from cortex.gateway.background import Background
from cortex.gateway.catalogue import Profile, Target
from cortex.gateway.config import Timeouts
from cortex.gateway.eviction import EvictionPolicy
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.metrics import Metrics
from cortex.gateway.placement import place
from cortex.gateway.poller import Poller
from cortex.gateway.routing import NOBODY, Load, Refuse, Serve, Wait, decide, replicas
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import (
    ApiError,
    InternalError,
    ModelLoading,
    ModelNotFound,
    NodeFailed,
    NodeTimeout,
)
from cortex.ipc.node_api import LoadRequest, Progress, UnloadRequest

ATTEMPTS = 3
"""How often a model may vanish again after a load before a request gives up."""

log = structlog.get_logger()


class RunningLoad:
    """A load that requests may wait for; over when ``finished`` is set, and ``error`` tells how."""

    def __init__(self, target: Target, node: Node, fleet: Fleet) -> None:
        self.target = target
        self.node = node
        self.finished = asyncio.Event()
        self.error: ApiError | None = None
        self._fleet = fleet

    @property
    def progress(self) -> Progress | None:
        """What its node last said of it, if anything."""
        model = self._fleet.node(self.node.name).model(self.target.node_id)
        return model.progress if model else None

    def describe(self) -> str:
        """Return how far it has come, in words."""
        said = f"loading {self.target.id} on {self.node.name}"
        progress = self.progress
        if progress is None:
            return said
        if progress.bytes_total:
            percent = 100 * progress.bytes_done // progress.bytes_total
            return f"{said}: {progress.phase} {percent}%"
        return f"{said}: {progress.phase}"


Heartbeat = Callable[[RunningLoad], Awaitable[None]]


async def in_silence(load: RunningLoad) -> None:
    """A heartbeat for those whose client hears nothing before the answer."""
    del load


class Lifecycle:
    """Loads and unloads; every load in flight is here once."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        poller: Poller,
        client: NodeClient,
        background: Background,
        eviction: EvictionPolicy,
        metrics: Metrics,
        timeouts: Timeouts,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._client = client
        self._background = background
        self._eviction = eviction
        self._metrics = metrics
        self._timeouts = timeouts
        self._loads: dict[str, RunningLoad] = {}

    async def ready(
        self,
        target: Target,
        *,
        excluded: AbstractSet[str] = NOBODY,
        heartbeat: Heartbeat = in_silence,
    ) -> Serve:
        """Return the replica for a request, loading the model first where that is needed.

        Raise what ``decide`` refuses with, or what the load failed with.
        """
        await self._poller.first_round()
        reason = None
        has_looked_again = False
        for _ in range(ATTEMPTS):
            decision = decide(self._fleet.snapshot(), target, excluded)
            match decision:
                case Serve():
                    return Serve(decision.node, reason or decision.reason)
                case Refuse(error, node):
                    if node is None or has_looked_again:
                        raise error
                    has_looked_again = True
                    await self._poller.refresh(node.name)
                case Wait(node):
                    reason = "after-load"
                    load = self._loads.get(target.node_id) or self._follow(target, node)
                    await self.wait(load, heartbeat)
                case Load():
                    reason = "loaded-on-demand"
                    load = self._loads.get(target.node_id) or self._load(target, excluded=excluded)
                    await self.wait(load, heartbeat)
        raise ModelLoading(f"{target.id!r} does not stay loaded", retry_after_seconds=5)

    def load_unless_loaded(self, target: Target, *, node: Node | None) -> RunningLoad | None:
        """Return the load of *target*, to *node* if given; None where it is loaded already.

        A load that runs already is returned, wherever it goes.
        """
        if running := self._loads.get(target.node_id):
            return running
        snapshot = self._fleet.snapshot()
        where = [node] if node else list(snapshot.nodes)
        if any(known in where for known in replicas(snapshot, target.node_id)):
            return None
        return self._load(target, node=node)

    def _load(
        self, target: Target, *, node: Node | None = None, excluded: AbstractSet[str] = NOBODY
    ) -> RunningLoad:
        """Return a new load of *target*; raise where no node may take it."""
        profile = target.profile
        if profile is None:
            raise ModelNotFound(f"{target.id!r} is not in the catalogue", param="model")
        where = node or place(self._fleet.snapshot(), profile, excluded).node
        return self._start(RunningLoad(target, where, self._fleet), profile)

    async def unload(self, target: Target, *, node: str | None, force: bool) -> list[str]:
        """Unload *target* wherever it is, or from *node*; return the names of those nodes."""
        holding = [
            known
            for known in self._fleet.snapshot().nodes
            if known.status_of(target.node_id) and node in (None, known.name)
        ]
        if not holding:
            raise ModelNotFound(f"no node has {target.id!r}", param="model")
        for known in holding:
            await self._unload(known, target.node_id, force=force)
        return [known.name for known in holding]

    async def _unload(self, node: Node, node_id: str, *, force: bool) -> None:
        body = msgspec.json.encode(UnloadRequest(node_id, force=force))
        await self._client.control(node, "POST /models/unload", body)
        await self._poller.refresh(node.name)
        log.info("model unloaded", model=node_id, node=node.name)

    def _follow(self, target: Target, node: Node) -> RunningLoad:
        """Return a load that somebody else started."""
        return self._start(RunningLoad(target, node, self._fleet), None)

    def _start(self, load: RunningLoad, profile: Profile | None) -> RunningLoad:
        self._loads[load.target.node_id] = load
        self._background.start(self._run(load, profile), f"load {load.target.id}")
        return load

    async def wait(self, load: RunningLoad, heartbeat: Heartbeat = in_silence) -> None:
        """Return when *load* has ended well; raise what it has failed with."""
        while not load.finished.is_set():
            try:
                async with asyncio.timeout(self._timeouts.keep_alive_seconds):
                    await load.finished.wait()
            except TimeoutError:
                await heartbeat(load)
        if load.error:
            raise load.error

    async def _run(self, load: RunningLoad, profile: Profile | None) -> None:
        known: dict[str, Any] = {"model": load.target.id, "node": load.node.name}
        try:
            async with asyncio.timeout(self._timeouts.load_seconds):
                if profile:
                    log.info("model load started", **known)
                    await self._ask_for(load, profile)
                await self._until_loaded(load)
            log.info("model loaded", **known)
        except TimeoutError:
            load.error = NodeTimeout(
                f"{load.describe()} took longer than {self._timeouts.load_seconds:.0f} s"
            )
        except ApiError as error:
            load.error = error
        except Exception:
            log.exception("model load failed", **known)
            load.error = InternalError("internal error while a model was loading")
        finally:
            if load.error:
                log.warning("model not loaded", code=load.error.code, why=str(load.error), **known)
            del self._loads[load.target.node_id]
            load.finished.set()

    async def _ask_for(self, load: RunningLoad, profile: Profile) -> None:
        for victim in self._eviction.victims(load.node, profile):
            await self._unload(load.node, victim, force=False)
        request: LoadRequest = profile.load_request()
        await self._client.control(load.node, "POST /models/load", msgspec.json.encode(request))
        self._metrics.cold_starts.labels(load.target.id, load.node.name).inc()

    async def _until_loaded(self, load: RunningLoad) -> None:
        """Return once the node says that the model is loaded; raise NodeFailed if it never will."""
        while True:
            await self._poller.refresh(load.node.name)
            node = self._fleet.node(load.node.name)
            if not node.is_healthy:
                raise NodeFailed(f"node {node.name} went down while loading {load.target.id!r}")
            status = node.status_of(load.target.node_id)
            has_answered = not node.failures  # else what we know is from before the load
            if has_answered and status == "loaded":
                return
            if has_answered and status in ("failed", None):
                raise NodeFailed(self._why(load, node))
            await asyncio.sleep(self._timeouts.poll_while_loading_seconds)

    def _why(self, load: RunningLoad, node: Node) -> str:
        model = node.model(load.target.node_id)
        failure = model.failure if model else "it is gone"
        return f"{load.target.id!r} could not be loaded on {node.name}: {failure}"
