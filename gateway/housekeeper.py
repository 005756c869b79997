"""Does what ``housekeeping.py`` decides, as often as nodes are polled.

An act that fails is tried again after a while, and told again only when it fails in another way.
"""

from __future__ import annotations

import asyncio

import structlog

from cortex.gateway import housekeeping
from cortex.gateway.background import Background
from cortex.gateway.catalogue import Target
from cortex.gateway.fleet import Fleet
from cortex.gateway.housekeeping import Act, Comings, Preload, Restart, Unload
from cortex.gateway.lifecycle import Lifecycle
from cortex.gateway.poller import Poller
from cortex.gateway.upstream import NodeClient
from cortex.gateway.written import Written
from cortex.ipc.errors import ApiError

RETRY_SECONDS = 15.0
"""Before an act that has failed is tried again."""

log = structlog.get_logger()


class Housekeeper:
    """One task of the daemon's life; each act of it runs beside the others, once."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        poller: Poller,
        client: NodeClient,
        lifecycle: Lifecycle,
        background: Background,
        written: Written,
    ) -> None:
        self._fleet = fleet
        self._poller = poller
        self._client = client
        self._lifecycle = lifecycle
        self._background = background
        self._written = written
        self._under_way: set[Act] = set()
        self._seen: dict[str, Comings] = {}
        self._failed: dict[Act, tuple[float, str]] = {}
        """When it may be tried again, and what it has failed with."""

    async def run(self) -> None:
        """Look after the fleet for ever."""
        await self._poller.first_round()
        while True:
            self._look()
            await asyncio.sleep(self._written.timeouts.poll_seconds)

    def _look(self) -> None:
        snapshot, written = self._fleet.snapshot(), self._written
        loading = {load.node.name for load in self._lifecycle.loads if load.node}
        acts = housekeeping.due(snapshot, written.catalogue, written.config.eviction, loading)
        self._failed = {act: tried for act, tried in self._failed.items() if act in acts}
        preloads, self._seen = housekeeping.preloads(snapshot, written.catalogue, self._seen)
        for act in [*acts, *preloads]:
            not_before, _ = self._failed.get(act, (0.0, ""))
            if act not in self._under_way and snapshot.now >= not_before:
                self._under_way.add(act)
                self._background.start(self._do(act), f"housekeeping: {act}")

    async def _do(self, act: Act) -> None:
        try:
            match act:
                case Unload():
                    await self._unload(act)
                case Restart():
                    await self._restart(act)
                case Preload():
                    await self._preload(act)
        except ApiError as error:
            self._note_failure(act, str(error))
        except Exception:  # a bug here must not end the daemon
            log.exception("housekeeping broke", act=str(act))
            self._note_failure(act, "internal error")
        finally:
            self._under_way.discard(act)

    async def _unload(self, act: Unload) -> None:
        # By its name there: what an alias of the same name means is another model.
        target = Target(self._written.catalogue.public_id(act.model), act.model, None)
        await self._lifecycle.unload(target, node=act.node, force=False, reason=act.reason)

    async def _restart(self, act: Restart) -> None:
        node = self._fleet.node(act.node)
        await self._client.control(node, f"POST /devices/{act.device}/restart", b"{}")
        log.info("idle device restarted", node=act.node, device=act.device, cycles=act.cycles)
        await self._poller.refresh(act.node)

    async def _preload(self, act: Preload) -> None:
        target = self._written.catalogue.target(act.model)
        load = self._lifecycle.load_unless_loaded(target, node=None, may_evict=False)
        if load is None:
            return
        await load.finished.wait()
        if load.error is not None:
            raise load.error

    def _note_failure(self, act: Act, why: str) -> None:
        _, known = self._failed.get(act, (0.0, ""))
        self._failed[act] = (self._fleet.snapshot().now + RETRY_SECONDS, why)
        if why != known:
            log.warning("housekeeping failed", act=str(act), why=why)
