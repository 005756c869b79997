"""Keeps what we know of the fleet true.

One task a node, so that a slow node delays nobody: ``/models`` and ``/health``, then a
pause, shorter while a load runs there. Whoever must know more asks for a ``refresh``, which is
answered by a poll that began after the question. Whoever has met something else than what is known
of a node ``doubt``s it: it is polled at once, and who tells clients of the fleet awaits ``settled``
first.
"""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import msgspec
import structlog

from cortex.gateway.background import Background
from cortex.gateway.config import Timeouts
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import Health, ModelInfo

SETTLING_SECONDS = 1.0
"""What somebody who only wants to look waits for nodes that are in doubt."""

T = TypeVar("T")
log = structlog.get_logger()


class Poller:
    """Polls every node of *fleet*; the only writer of what is known of them."""

    def __init__(self, fleet: Fleet, client: NodeClient, timeouts: Timeouts) -> None:
        self._nodes = {
            node.name: NodePoller(node.name, fleet, client, timeouts)
            for node in fleet.snapshot().nodes
        }

    def start(self, background: Background) -> None:
        """Start polling."""
        for name, poller in self._nodes.items():
            background.start(poller.run(), f"poll {name}")

    async def refresh(self, name: str) -> None:
        """Return once node *name* has been polled by a poll that begins after this call."""
        await self._nodes[name].refresh()

    def doubt(self, name: str) -> None:
        """Poll node *name* at once: it has just said or done what does not fit what we know."""
        self._nodes[name].doubt()

    async def settled(self) -> None:
        """Return once no node is in doubt or not polled yet, or after a second."""
        try:
            async with asyncio.timeout(SETTLING_SECONDS):
                for poller in self._nodes.values():
                    await poller.settled.wait()
        except TimeoutError:
            return

    async def first_round(self) -> None:
        """Return once every node has been polled, whatever came of it."""
        for poller in self._nodes.values():
            await poller.polled.wait()


class NodePoller:
    """Polls one node; ``polled`` is set after the first poll, ``settled`` while it is undoubted."""

    def __init__(self, name: str, fleet: Fleet, client: NodeClient, timeouts: Timeouts) -> None:
        self._next_poll = asyncio.Event()
        self.polled = self._next_poll
        self.settled = self._next_poll
        self._name = name
        self._fleet = fleet
        self._client = client
        self._timeouts = timeouts
        self._wanted = asyncio.Event()

    async def refresh(self) -> None:
        """Return after the next poll that begins from now on."""
        polled = self._next_poll
        self._wanted.set()
        await polled.wait()

    def doubt(self) -> None:
        """Poll at once; not settled before that has been done."""
        self.settled = self._next_poll
        self._wanted.set()

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            self._wanted.clear()
            polled, self._next_poll = self._next_poll, asyncio.Event()
            await self._poll()
            polled.set()
            await self._pause()

    async def _pause(self) -> None:
        is_loading = self._fleet.node(self._name).is_loading
        timeouts = self._timeouts
        pause = timeouts.poll_while_loading_seconds if is_loading else timeouts.poll_seconds
        try:
            async with asyncio.timeout(pause):
                await self._wanted.wait()
        except TimeoutError:
            return

    async def _poll(self) -> None:
        before = self._fleet.node(self._name)
        own = self._fleet.own(self._name)
        try:
            health, models = await self._ask(before)
        except ApiError as error:
            after = before.missed(str(error), time.time())
        else:
            after = before.answered(health, models, own, time.time())
        self._fleet.put(after)
        if after.is_healthy != before.is_healthy:
            log.info(
                "node went up or down", node=self._name, is_up=after.is_healthy, why=after.error
            )
        elif after.error and after.error != before.error:
            log.warning("node not polled", node=self._name, why=after.error)

    async def _ask(self, node: Node) -> tuple[Health, list[ModelInfo]]:
        models = await self._get(node, "/models", list[ModelInfo])
        return await self._get(node, "/health", Health), models

    async def _get(self, node: Node, path: str, shape: type[T]) -> T:
        body = await self._client.control(node, f"GET {path}")
        try:
            return msgspec.json.decode(body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise UnreadableAnswer(f"GET {path}: {exc}") from exc


class UnreadableAnswer(ApiError):
    """A node answered a poll with something that is not in the contract."""

    status = 502
    code = "node_failed"
