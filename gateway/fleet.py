"""What we know of every node, and since when.

A Node is frozen: the poller puts a new one in place of the old one, and is the only one who does.
Our own requests in flight are counted beside it, so that between two polls the load of a node is
what it said, corrected by what we have sent it and got back since.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cortex.gateway.config import Neuron
from cortex.ipc.node_api import Health, ModelInfo, ModelStatus

STRIKES = 3
"""Polls in a row that fail before a node counts as down."""


@dataclass(frozen=True)
class Node:
    """One node of the fleet; ``since`` is when it went up or down, in seconds since the epoch."""

    name: str
    url: str
    is_healthy: bool = False
    since: float = 0.0
    failures: int = 0
    error: str | None = "not polled yet"
    health: Health | None = None
    models: tuple[ModelInfo, ...] = ()
    own_when_polled: Mapping[str, int] = field(default_factory=dict)

    def answered(
        self, health: Health, models: Iterable[ModelInfo], own: Mapping[str, int], now: float
    ) -> Node:
        """Return the node after a poll that worked: one success brings it up."""
        since = self.since if self.is_healthy else now
        return replace(
            self,
            is_healthy=True,
            since=since,
            failures=0,
            error=None,
            health=health,
            models=tuple(models),
            own_when_polled=own,
        )

    def missed(self, reason: str, now: float) -> Node:
        """Return the node after a poll that failed: the third in a row takes it down."""
        failures = self.failures + 1
        is_healthy = self.is_healthy and failures < STRIKES
        since = now if self.is_healthy and not is_healthy else self.since
        return replace(self, is_healthy=is_healthy, since=since, failures=failures, error=reason)

    @property
    def takes_requests(self) -> bool:
        """Up, and not on its way out."""
        return self.is_healthy and not (self.health and self.health.draining)

    @property
    def free_mb(self) -> int:
        """Memory that is free on the devices that are ready, as far as it can be read."""
        devices = self.health.devices if self.health else []
        return sum(device.vram_free_mb or 0 for device in devices if device.state == "ready")

    def model(self, model_id: str) -> ModelInfo | None:
        """Return what the node says about *model_id*."""
        return next((model for model in self.models if model.id == model_id), None)

    def status_of(self, model_id: str) -> ModelStatus | None:
        """Return the state of *model_id*; what the node is about to load is loading."""
        if model := self.model(model_id):
            return model.status
        activation = self.health.activation if self.health else None
        if activation and (model_id in activation.pending or model_id == activation.in_progress):
            return "loading"
        return None

    @property
    def is_loading(self) -> bool:
        """Whether any model of it is on its way."""
        busy = any(model.status in ("loading", "recovering", "unloading") for model in self.models)
        return busy or (self.health is not None and self.health.activation.state == "pre_warming")

    def polled_load(self, model_id: str) -> int:
        """Requests for *model_id*, running and queued, when it was polled."""
        loads = self.health.models if self.health else []
        return sum(load.in_flight + load.queue_depth for load in loads if load.id == model_id)


@dataclass(frozen=True)
class FleetSnapshot:
    """The fleet at one moment; ``own`` counts our requests by (node, model)."""

    nodes: tuple[Node, ...]
    own: Mapping[tuple[str, str], int]

    def load_of(self, node: Node, model_id: str) -> int:
        """Others' requests when polled, plus ours now."""
        others = node.polled_load(model_id) - node.own_when_polled.get(model_id, 0)
        return max(others, 0) + self.own.get((node.name, model_id), 0)


class Fleet:
    """The nodes by name, in the order of the configuration."""

    def __init__(self, neurons: Iterable[Neuron]) -> None:
        self._nodes = {n.name: Node(n.name, n.url, since=time.time()) for n in neurons}
        self._own: Counter[tuple[str, str]] = Counter()

    def node(self, name: str) -> Node:
        """Return the node called *name*."""
        return self._nodes[name]

    def put(self, node: Node) -> None:
        """Replace what we know of a node; for the poller only."""
        self._nodes[node.name] = node

    def snapshot(self) -> FleetSnapshot:
        """Return what we know now."""
        return FleetSnapshot(tuple(self._nodes.values()), dict(self._own))

    def own(self, name: str) -> dict[str, int]:
        """Return our requests in flight on node *name*, by model."""
        return {model: n for (node, model), n in self._own.items() if node == name}

    @contextmanager
    def holding(self, name: str, model_id: str) -> Iterator[None]:
        """Count a request of ours on node *name* while the block runs."""
        key = (name, model_id)
        self._own[key] += 1
        try:
            yield
        finally:
            self._own[key] -= 1
            if not self._own[key]:
                del self._own[key]
