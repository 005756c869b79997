"""Keeps what we know of the fleet true.

One task a node, so that a slow node delays nobody: ``/models`` and ``/health``, of an engine
``/v1/models``, then a pause, shorter while a load runs there; ``/discovery`` once it is up, and
again when it has begun anew. Whoever must know more asks for a ``refresh``, which is answered by a
poll that began after the question. Whoever has met something else than what is known of a node
``doubt``s it: it is polled at once, and who tells clients of the fleet awaits ``settled`` first.

An engine that answers one request of ours is left alone meanwhile, as long as nobody asks: there
are servers that answer one thing at a time (llama-cpp-python's), and end a stream for the next.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TypeVar

import msgspec
import structlog

from cortex.gateway.background import Background
from cortex.gateway.engine_models import ModelPage, offered
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.upstream import NodeClient
from cortex.gateway.written import Written
from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import Discovery, Health, ModelInfo

SETTLING_SECONDS = 1.0
"""What somebody who only wants to look waits for nodes that are in doubt."""

T = TypeVar("T")
log = structlog.get_logger()


class Poller:
    """Polls every node of *fleet*; the only writer of what is known of them."""

    def __init__(self, fleet: Fleet, client: NodeClient, written: Written) -> None:
        self._fleet = fleet
        self._client = client
        self._written = written
        self._nodes = {node.name: self._poller(node) for node in fleet.snapshot().nodes}

    def _poller(self, node: Node) -> NodePoller:
        return NodePoller(node.name, self._fleet, self._client, self._written)

    def start(self, background: Background) -> None:
        """Start polling."""
        for poller in self._nodes.values():
            poller.start(background)

    def configure(self, background: Background) -> None:
        """Poll the nodes that the fleet has by now: new ones at once, removed ones no more."""
        nodes = self._fleet.snapshot().nodes
        for gone in self._nodes.keys() - {node.name for node in nodes}:
            self._nodes.pop(gone).stop()
        for node in nodes:
            if node.name not in self._nodes:
                self._nodes[node.name] = self._poller(node)
                self._nodes[node.name].start(background)
            elif node.health is None:
                self.doubt(node.name)  # it may be at another address

    async def refresh(self, name: str) -> None:
        """Return once node *name* has been polled by a poll that begins after this call."""
        if poller := self._nodes.get(name):
            await poller.refresh()

    def doubt(self, name: str) -> None:
        """Poll node *name* at once: it has just said or done what does not fit what we know."""
        if poller := self._nodes.get(name):
            poller.doubt()

    async def settled(self) -> None:
        """Return once no node is in doubt or not polled yet, or after a second."""
        try:
            async with asyncio.timeout(SETTLING_SECONDS):
                for poller in list(self._nodes.values()):
                    await poller.settled.wait()
        except TimeoutError:
            return

    async def first_round(self) -> None:
        """Return once every node has been polled, whatever came of it."""
        for poller in list(self._nodes.values()):
            await poller.polled.wait()


class NodePoller:
    """Polls one node; ``polled`` is set after the first poll, ``settled`` while it is undoubted."""

    def __init__(self, name: str, fleet: Fleet, client: NodeClient, written: Written) -> None:
        self._next_poll = asyncio.Event()
        self.polled = self._next_poll
        self.settled = self._next_poll
        self._name = name
        self._fleet = fleet
        self._client = client
        self._written = written
        self._wanted = asyncio.Event()
        self._this_poll = self._next_poll
        self._task: asyncio.Task[None] | None = None
        self._is_discovered = False
        self._not_listed: list[str] = []
        """What the operator wants offered of an engine that does not have it."""

    def start(self, background: Background) -> None:
        """Begin to poll."""
        self._task = background.task(self.run(), f"poll {self._name}")

    def stop(self) -> None:
        """Poll no more; whoever waits for a poll is not kept."""
        if self._task is not None:
            self._task.cancel()
        self._this_poll.set()
        self._next_poll.set()

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
            self._this_poll, self._next_poll = self._next_poll, asyncio.Event()
            await self._poll()
            self._this_poll.set()
            await self._pause()

    async def _pause(self) -> None:
        is_loading = self._fleet.node(self._name).is_loading
        timeouts = self._written.timeouts
        pause = timeouts.poll_while_loading_seconds if is_loading else timeouts.poll_seconds
        while not self._wanted.is_set():
            try:
                async with asyncio.timeout(pause):
                    await self._wanted.wait()
            except TimeoutError:
                if not self._would_disturb():
                    return

    def _would_disturb(self) -> bool:
        is_engine = self._fleet.node(self._name).is_engine
        return is_engine and sum(self._fleet.own(self._name).values()) == 1

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
        if after.is_healthy and not after.failures:
            await self._discover(before, after)

    async def _discover(self, before: Node, node: Node) -> None:
        """Ask *node* which devices it has, unless it has said so in this life."""
        is_new = node.has_begun_anew(before)
        self._is_discovered = self._is_discovered and not is_new
        if self._is_discovered or node.is_engine:
            return
        try:
            discovery = await self._get(node, "/discovery", Discovery)
        except ApiError as error:
            if is_new:
                log.warning("node not discovered", node=self._name, why=str(error))
        else:
            self._is_discovered = True
            self._fleet.put(replace(node, discovery=discovery))

    async def _ask(self, node: Node) -> tuple[Health, list[ModelInfo]]:
        if node.is_engine:
            return Health(0.0), self._offered(await self._get(node, "/v1/models", ModelPage))
        models = await self._get(node, "/models", list[ModelInfo])
        return await self._get(node, "/health", Health), models

    def _offered(self, page: ModelPage) -> list[ModelInfo]:
        """Return what is offered of the engine's models; say once what of the wanted is not."""
        engines = self._written.config.engines
        wanted = next((engine.models for engine in engines if engine.name == self._name), None)
        models = offered(page, wanted)
        missing = sorted(set(wanted or ()) - {model.id for model in models})
        if missing and missing != self._not_listed:
            log.warning(
                "models not offered: the engine does not list them", node=self._name, models=missing
            )
        self._not_listed = missing
        return models

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
