"""What we know of every node, and since when.

A Node is frozen: the poller puts a new one in place of the old one, and is the only one who does.
Our own requests in flight are counted beside it, so that between two polls the load of a node is
what it said, corrected by what we have sent it and got back since. What became of those requests
opens and closes its breaker.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from cortex.gateway.circuit_breaker import CLOSED, Breaker, BreakerState
from cortex.gateway.config import Engine, Neuron, Routing
from cortex.ipc.node_api import Discovery, Health, ModelInfo, ModelStatus

STRIKES = 3
"""Polls in a row that fail before a node counts as down."""


@dataclass(frozen=True)
class Node:
    """One node of the fleet; ``since`` is when it went up or down, in seconds since the epoch.

    An engine is a node that loads and unloads nothing for us, and tells nothing of its load. What
    the poller cannot know is put in by ``Fleet.snapshot``: whether an operator has drained it, its
    breaker, and whether it has all of our requests that it may have.
    """

    name: str
    url: str
    is_healthy: bool = False
    since: float = 0.0
    failures: int = 0
    error: str | None = "not polled yet"
    health: Health | None = None
    models: tuple[ModelInfo, ...] = ()
    own_when_polled: Mapping[str, int] = field(default_factory=dict)
    discovery: Discovery | None = None
    is_engine: bool = False
    is_drained: bool = False
    breaker: BreakerState = "closed"
    resting_seconds: float = 0.0
    """For how long its breaker keeps requests away; also while one of them tries it."""
    is_full: bool = False
    """Whether it has as many of our requests as the operator gives it."""

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
    def is_leaving(self) -> bool:
        """Whether an operator drains it, or it drains by itself."""
        return self.is_drained or (self.health is not None and self.health.draining)

    @property
    def is_resting(self) -> bool:
        """Whether its breaker keeps requests away."""
        return self.breaker == "open" or self.resting_seconds > 0

    def is_same_as(self, other: Node) -> bool:
        """Whether both are one node; at another address it is another one, whatever its name."""
        return (self.url, self.is_engine) == (other.url, other.is_engine)

    def has_begun_anew(self, before: Node) -> bool:
        """Whether it may be another process, with other devices, than it was *before*."""
        if before.health is None or self.health is None or not before.is_healthy:
            return True
        return self.health.uptime_secs < before.health.uptime_secs

    @property
    def takes_requests(self) -> bool:
        """Up, not on its way out, and not known to break what it is given."""
        return self.is_healthy and not self.is_leaving and not self.is_resting

    @property
    def takes_loads(self) -> bool:
        """Whether a model may be loaded there."""
        return self.takes_requests and not self.is_engine

    def model(self, model_id: str) -> ModelInfo | None:
        """Return what the node says about *model_id*."""
        return self._by_id.get(model_id)

    @cached_property
    def _by_id(self) -> dict[str, ModelInfo]:
        return {model.id: model for model in self.models}

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
        """Whether any model or device of it is on its way."""
        busy = any(model.status in ("loading", "recovering", "unloading") for model in self.models)
        if busy or self.health is None:
            return busy
        starting = any(d.state in ("starting", "restarting") for d in self.health.devices)
        return starting or self.health.activation.state == "pre_warming"

    def polled_load(self, model_id: str) -> int:
        """Requests for *model_id*, running and queued, when it was polled."""
        return self._loads.get(model_id, 0)

    @cached_property
    def _loads(self) -> dict[str, int]:
        loads = self.health.models if self.health else []
        return {load.id: load.in_flight + load.queue_depth for load in loads}


Place = tuple[str, str]
"""A model on a node: the node's name, and the model's name there."""


@dataclass(frozen=True)
class FleetSnapshot:
    """The fleet at one moment; ``own`` counts our requests. Times are of ``time.monotonic``."""

    nodes: tuple[Node, ...]
    own: Mapping[Place, int]
    now: float = 0.0
    loaded_at: Mapping[Place, float] = field(default_factory=dict)
    """When a model was first seen loaded, without having been away since."""
    last_used: Mapping[Place, float] = field(default_factory=dict)
    """When it last had a request, as far as we know; a model that has had none is not in it."""
    stay_seconds: Mapping[Place, float] = field(default_factory=dict)
    """What a request's ``keep_alive`` said last; infinite: for ever."""
    pinned: AbstractSet[Place] = frozenset()
    """Never evicted, never unloaded for being idle."""

    def idle_seconds(self, place: Place) -> float:
        """Return for how long nobody has used *place*: since it was loaded, or its last request."""
        last = max(self.loaded_at.get(place, self.now), self.last_used.get(place, 0.0))
        return self.now - last

    def load_of(self, node: Node, model_id: str) -> int:
        """Others' requests when polled, plus ours now."""
        others = node.polled_load(model_id) - node.own_when_polled.get(model_id, 0)
        return max(others, 0) + self.own.get((node.name, model_id), 0)


class Fleet:
    """The nodes by name, in the order of the configuration."""

    def __init__(
        self,
        neurons: Iterable[Neuron],
        engines: Iterable[Engine] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes: dict[str, Node] = {}
        self._max_in_flight: dict[str, int] = {}
        """Of those engines that have a bound."""
        self._clock = clock
        self._own: Counter[Place] = Counter()
        self._breakers: dict[str, Breaker] = {}
        """Of those nodes whose last requests were not all answered."""
        self._loaded_at: dict[Place, float] = {}
        self._last_used: dict[Place, float] = {}
        self._stay_seconds: dict[Place, float] = {}
        self.pinned: set[Place] = set()
        """For ``pins.py`` only to change."""
        self.drained: set[str] = set()
        """Nodes that operators have drained; for ``drains.py`` only to change."""
        self.watchers: list[Callable[[str], None]] = []
        """Told the name of a node of which a poll, or the end of a request, says something new."""
        self.configure(neurons, engines)

    def configure(self, neurons: Iterable[Neuron], engines: Iterable[Engine] = ()) -> None:
        """Have these nodes and no others; what is known of those that stay the same is kept."""
        engines = tuple(engines)
        written = [(neuron, False) for neuron in neurons] + [(engine, True) for engine in engines]
        self._max_in_flight = {e.name: e.max_in_flight for e in engines if e.max_in_flight}
        before, now = self._nodes, time.time()
        self._nodes = {}
        for n, is_engine in written:
            new = Node(n.name, n.url, since=now, is_engine=is_engine)
            old = before.get(n.name)
            self._nodes[n.name] = old if old and old.is_same_as(new) else new
        for name, old in before.items():
            if self._nodes.get(name) is not old:
                self._breakers.pop(name, None)
                self._forget({known for known in self._last_used if known[0] == name})
                self._forget({known for known in self._loaded_at if known[0] == name})

    def node(self, name: str) -> Node:
        """Return the node called *name*; one that was removed is down for ever."""
        return self._nodes.get(name) or Node(name, "", error="no longer configured")

    def put(self, node: Node) -> None:
        """Replace what we know of a node; for the poller only."""
        known = self._nodes.get(node.name)
        if known is None or not known.is_same_as(node):
            return  # it was removed or changed while it was polled
        self._nodes[node.name] = node
        if node.is_healthy and not node.failures:  # else it may be the same when it is back
            self._note_loaded(node)
        self._tell(node.name)

    def _note_loaded(self, node: Node) -> None:
        loaded = {(node.name, model.id) for model in node.models if model.status == "loaded"}
        self._forget({known for known in self._loaded_at if known[0] == node.name} - loaded)
        for place in loaded:
            self._loaded_at.setdefault(place, self._clock())
            if node.polled_load(place[1]):  # perhaps of somebody who asks the node directly
                self._last_used[place] = self._clock()

    def _tell(self, name: str) -> None:
        for watcher in self.watchers:
            watcher(name)

    def _forget(self, places: AbstractSet[Place]) -> None:
        for place in places:
            for times in (self._loaded_at, self._last_used, self._stay_seconds):
                times.pop(place, None)

    def stay(self, place: Place, seconds: float | None) -> None:
        """Note how long a request wants its model to stay when nobody uses it; None: no word."""
        if seconds is not None:
            self._stay_seconds[place] = seconds

    def now(self) -> float:
        """Return the time as snapshots tell it."""
        return self._clock()

    def snapshot(self) -> FleetSnapshot:
        """Return what we know now."""
        now = self.now()
        return FleetSnapshot(
            nodes=tuple(self._shown(node, now) for node in self._nodes.values()),
            own=dict(self._own),
            now=now,
            loaded_at=dict(self._loaded_at),
            last_used=dict(self._last_used),
            stay_seconds=dict(self._stay_seconds),
            pinned=frozenset(self.pinned),
        )

    def _shown(self, node: Node, now: float) -> Node:
        breaker, is_full = self._breaker(node.name), self._is_full(node.name)
        if breaker is CLOSED and node.name not in self.drained and not is_full:
            return node
        return replace(
            node,
            is_full=is_full,
            is_drained=node.name in self.drained,
            breaker=breaker.state(now),
            resting_seconds=breaker.seconds_closed_to_requests(now),
        )

    def _is_full(self, name: str) -> bool:
        bound = self._max_in_flight.get(name)
        return bound is not None and sum(self.own(name).values()) >= bound

    def began(self, name: str) -> None:
        """Note that node *name* has begun to answer a request."""
        self._set_breaker(name, self._breaker(name).left())

    def worked(self, name: str) -> None:
        """Note that node *name* has answered a request to the end."""
        self._set_breaker(name, self._breaker(name).worked())

    def broke(self, name: str, rules: Routing) -> bool:
        """Note that node *name* has broken a request; return whether that opens its breaker."""
        now, before = self._clock(), self._breaker(name)
        after = before.failed(now, rules.breaker_failures, rules.breaker_open_seconds)
        self._set_breaker(name, after)
        return after.state(now) == "open" != before.state(now)

    def _breaker(self, name: str) -> Breaker:
        return self._breakers.get(name, CLOSED)

    def _set_breaker(self, name: str, breaker: Breaker) -> None:
        if breaker is CLOSED or name not in self._nodes:
            self._breakers.pop(name, None)
        else:
            self._breakers[name] = breaker

    def own(self, name: str) -> dict[str, int]:
        """Return our requests in flight on node *name*, by model."""
        return {model: n for (node, model), n in self._own.items() if node == name}

    @contextmanager
    def holding(self, name: str, model_id: str) -> Iterator[None]:
        """Count a request of ours on node *name* while the block runs; it may be its trial."""
        key = (name, model_id)
        self._own[key] += 1
        self._last_used[key] = self._clock()
        self._set_breaker(name, self._breaker(name).asked(self._clock()))
        try:
            yield
        finally:
            self._set_breaker(name, self._breaker(name).left())
            self._last_used[key] = self._clock()
            self._own[key] -= 1
            if not self._own[key]:
                del self._own[key]
                self._tell(name)
