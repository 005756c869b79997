"""The queue for memory: every demand, and whose turn it is.

Whose turn it is is decided anew (``residency.py``) whenever something has happened: a demand came
or went, a poll said something, a request or a load ended, a dwell is over. What was decided is done
by ``loading.py``, one task a load; loads that have nothing to do with each other run side by side.

A load that a node refuses for want of memory teaches what the model needs, and the model is placed
anew; one that meets a node that is away or broken goes to another node, each once. Whatever else
goes wrong is told to everybody who waits, and for some seconds to those who come after them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import replace

import structlog

from cortex.gateway.background import Background
from cortex.gateway.catalogue import Target
from cortex.gateway.demands import RETRY_SECONDS, Demand, Failures, Heartbeat, in_silence
from cortex.gateway.eviction import Rules
from cortex.gateway.fleet import Fleet, FleetSnapshot, Node, Place
from cortex.gateway.loading import Loading, TooSlow, what_now
from cortex.gateway.metrics import Metrics
from cortex.gateway.needs import Needs
from cortex.gateway.placement import Need
from cortex.gateway.residency import Action, Hold, Refuse, Start, turns
from cortex.gateway.room import Claim, accounted_mb, has_room
from cortex.gateway.rounds import Rounds
from cortex.gateway.routing import NOBODY, replicas
from cortex.gateway.upstream import Unreachable
from cortex.gateway.written import Written
from cortex.ipc.errors import ApiError, Conflict, InternalError, Overloaded

MAX_ATTEMPTS = 8
"""How often a demand is placed before what its last load failed with is the answer."""

log = structlog.get_logger()


class MemoryQueue:
    """The only writer of demands."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        loading: Loading,
        needs: Needs,
        background: Background,
        metrics: Metrics,
        written: Written,
    ) -> None:
        self.demands: dict[str, Demand] = {}
        """By the model's name on nodes."""
        self._fleet = fleet
        self._loading = loading
        self._needs = needs
        self._background = background
        self._metrics = metrics
        self._written = written
        self._claims: dict[str, Claim] = {}
        self._closing: frozenset[Place] = frozenset()
        self._arriving: Counter[Place] = Counter()
        self._failures = Failures()
        self._rounds = Rounds(background, self._decide_or_say_why)
        fleet.watchers.append(lambda _: self._rounds.hear())

    @property
    def claims(self) -> list[Claim]:
        """The memory that loads which run are on their way to."""
        return list(self._claims.values())

    def closed(self, node_id: str) -> frozenset[str]:
        """Return the nodes where *node_id* takes nothing new, because it is to go."""
        return frozenset(node for node, model in self._leaving() if model == node_id)

    def rules(self) -> Rules:
        """Return what decisions go by now."""
        coming = Counter(
            (d.node.name, d.target.node_id)
            for d in self.demands.values()
            if d.node is not None and d.is_under_way
        )
        return Rules.of(
            self._written.config.eviction,
            self._written.catalogue.profiles.values(),
            arriving=self._arriving + coming,
            closing=self._leaving(),
        )

    def _leaving(self) -> frozenset[Place]:
        going = {v.place for claim in self._claims.values() for v in claim.victims}
        return self._closing | going

    def join(
        self,
        target: Target,
        since: float,
        *,
        excluded: AbstractSet[str] = NOBODY,
        only: str | None = None,
        may_evict: bool = True,
        is_asked: bool = False,
    ) -> Demand:
        """Return the demand for *target*, which is new or there already.

        For a request (not *is_asked*) raise what its last load failed with a moment ago.
        """
        demand = self.demands.get(target.node_id)
        if demand is None:
            if not is_asked:
                self._failures.refuse(target.node_id, self._fleet.snapshot().now)
            demand = Demand(target, since, only=only, may_evict=may_evict)
            self.demands[target.node_id] = demand
            self._background.start(self._ask_what_it_needs(demand), f"needs of {target.id}")
        demand.since = min(demand.since, since)
        demand.excluded |= excluded
        demand.is_asked |= is_asked
        demand.may_evict |= may_evict
        return demand

    def take_back(self, node_id: str, node: str | None) -> bool:
        """End the demand for *node_id* that waits for its turn; return whether there was one.

        With *node* only one that may go nowhere else.
        """
        demand = self.demands.get(node_id)
        if demand is None or demand.is_under_way or node not in (None, demand.only):
            return False
        error = Conflict(f"the load of {demand.target.id!r} was taken back by an operator")
        # So that a client that tries again at once does not bring it back.
        self._failures.note(node_id, error, self._fleet.snapshot().now)
        self._end(demand, error)
        self._rounds.wake()
        return True

    def follow(self, target: Target, node: Node, since: float) -> Demand:
        """Return a demand for a load that somebody else has started on *node*."""
        demand = self.demands[target.node_id] = Demand(target, since)
        demand.phase, demand.node = "loading", node
        self._background.start(self._run(demand, None), f"follow {target.id}")
        return demand

    async def wait(
        self, demand: Demand, heartbeat: Heartbeat = in_silence, until: float | None = None
    ) -> None:
        """Return when *demand* has ended well; raise what it has failed with.

        Raise ModelLoading where that has not come *until* then, by the event loop's clock.
        """
        if not demand.finished.is_set():
            demand.waiting += 1
            try:
                seconds = self._written.timeouts.keep_alive_seconds
                await demand.over(heartbeat, seconds, until)
            finally:
                self._left(demand)
        if demand.error:
            raise demand.error

    def _left(self, demand: Demand) -> None:
        """Note that somebody waits no longer: it is at the node now, or has gone away."""
        demand.waiting -= 1
        if demand.finished.is_set():
            if demand.node and not demand.error:
                place = (demand.node.name, demand.target.node_id)
                self._arriving = +(self._arriving - Counter([place]))
        elif not (demand.is_wanted or demand.is_under_way):
            del self.demands[demand.target.node_id]
            self._rounds.wake()

    async def _ask_what_it_needs(self, demand: Demand) -> None:
        nodes = self._fleet.snapshot().nodes
        try:
            demand.needs |= await self._needs.of(nodes, demand.incoming())
        except Exception:
            log.exception("needs not known", model=demand.target.id)
            if self.demands.get(demand.target.node_id) is demand:
                self._end(demand, InternalError("internal error while a model was to be loaded"))
            return
        demand.phase = "waiting"
        self._rounds.wake()

    def _decide_or_say_why(self) -> float | None:
        """Decide; a bug ends those who wait, and not the daemon."""
        try:
            return self._decide()
        except Exception:
            log.exception("no decision")
            self._closing = frozenset()
            for demand in [d for d in self.demands.values() if d.phase == "waiting"]:
                self._end(demand, InternalError("internal error while a model was to be loaded"))
            return None

    def _decide(self) -> float | None:
        """Give everybody who waits an answer; return in how many seconds to look again."""
        snapshot = self._fleet.snapshot()
        limit = self._written.timeouts.load_seconds
        for demand in [d for d in self.demands.values() if d.phase == "waiting"]:
            if there := self._replica(snapshot, demand):
                demand.node = there
                self._end(demand, None)
            elif snapshot.now - demand.since >= limit:
                message = f"{demand.describe()}, for {limit:.0f} s now"
                self._end(demand, Overloaded(message, retry_after_seconds=RETRY_SECONDS))
        waiting = [d.incoming() for d in self.demands.values() if d.phase == "waiting"]
        actions = turns(snapshot, waiting, self.rules(), self.claims)
        held = [action for action in actions if isinstance(action, Hold)]
        self._closing = frozenset[Place]().union(*(hold.closing for hold in held))
        for action in actions:
            self._act(action)
        times = [hold.until for hold in held if hold.until is not None]
        times.extend(hold.incoming.since + limit for hold in held)
        return min(times) - snapshot.now if times else None

    def _replica(self, snapshot: FleetSnapshot, demand: Demand) -> Node | None:
        """Return who serves it by now without being about to give it up."""
        node_id = demand.target.node_id
        able = replicas(snapshot, node_id, demand.excluded | self.closed(node_id))
        return next((node for node in able if demand.only in (None, node.name)), None)

    def _act(self, action: Action) -> None:
        demand = self.demands[action.incoming.node_id]
        match action:
            case Start():
                demand.phase = "clearing" if action.claim.victims else "loading"
                demand.node, demand.why = action.candidate.node, None
                self._claims[demand.target.node_id] = action.claim
                self._background.start(self._run(demand, action), f"load {demand.target.id}")
            case Hold():
                demand.why = action.why
            case Refuse():
                self._end(demand, demand.setback or action.error)

    async def _run(self, demand: Demand, start: Start | None) -> None:
        """Load, or follow somebody else's load where there is nothing to start."""
        assert demand.node is not None
        error: ApiError | None = None
        began = self._fleet.snapshot().now
        limit = self._written.timeouts.load_seconds
        try:
            async with asyncio.timeout(limit):
                if start is not None:
                    await self._start(demand, start)
                await self._loading.follow(demand, demand.node.name)
        except TimeoutError:
            error = TooSlow(f"{demand.describe()} took longer than {limit:.0f} s")
        except ApiError as failure:
            error = failure
        except Exception:
            log.exception("model load failed", model=demand.target.id, node=demand.node.name)
            error = InternalError("internal error while a model was loading")
        finally:
            self._claims.pop(demand.target.node_id, None)
        self._ran(demand, start, error, self._fleet.snapshot().now - began)

    def _ran(
        self, demand: Demand, start: Start | None, error: ApiError | None, seconds: float
    ) -> None:
        """Note how a load of *demand* has ended; that may be not the end of the demand."""
        assert demand.node is not None
        where = (demand.target.id, demand.node.name)
        if error is None:
            self._metrics.load_seconds.labels(*where).observe(seconds)
            log.info("model loaded", model=where[0], node=where[1])
            self._end(demand, None)
            return
        why = {"code": error.code, "why": str(error)}
        log.warning("model not loaded", model=where[0], node=where[1], **why)
        self._metrics.failed_loads.labels(*where, error.code).inc()
        if not self._goes_on(demand, start, error):
            self._failures.note(demand.target.node_id, error, self._fleet.snapshot().now)
            self._end(demand, error)

    async def _start(self, demand: Demand, start: Start) -> None:
        claim, candidate = start.claim, start.candidate
        name = candidate.node.name
        log.info("model load started", model=demand.target.id, node=name, why=candidate.why)
        if claim.victims:
            demand.why = f"unloading {', '.join(v.name for v in claim.victims)} to make room"
            await self._loading.clear(claim, self._has_room)
            self._claims[demand.target.node_id] = replace(
                claim,
                phase="loading",
                shares_mb=candidate.wanted_mb,
                victims=(),
                accounted_mb=accounted_mb(self._fleet.node(name)),
            )
            demand.phase, demand.why = "loading", None
        devices = candidate.devices if candidate.share_mb is not None else ()
        await self._loading.ask(candidate.node, demand, devices)

    def _has_room(self, claim: Claim) -> bool:
        others = [other for other in self.claims if other.place != claim.place]
        return has_room(self._fleet.node(claim.place[0]), claim, others)

    def _goes_on(self, demand: Demand, start: Start | None, error: ApiError) -> bool:
        """Return whether *demand* waits for another turn after *error*; keep what that teaches."""
        assert demand.node is not None
        demand.attempts += 1
        is_ours = demand.target.profile is not None and demand.is_wanted
        if not is_ours or demand.attempts >= MAX_ATTEMPTS:
            return False
        name = demand.node.name
        is_room_left = start is None or self._has_room(start.claim)
        # Where nothing was reached nothing was said: the refusal that follows says more.
        demand.setback = None if isinstance(error, Unreachable) else error
        match what_now(error, demand.needs.get(name, Need()), has_room=is_room_left):
            case Need() as learned:
                demand.needs[name], demand.setback = learned, None
                self._needs.note(self._fleet.node(name), demand.incoming().profile, learned)
            case "elsewhere":
                demand.excluded.add(name)
            case "answer":
                return False
            case "again":
                pass
        demand.phase, demand.node, demand.progress, demand.why = "asking", None, None, None
        self._background.start(self._ask_what_it_needs(demand), f"needs of {demand.target.id}")
        return True

    def _end(self, demand: Demand, error: ApiError | None) -> None:
        demand.error = error
        del self.demands[demand.target.node_id]
        if demand.node and error is None and demand.waiting:
            self._arriving[demand.node.name, demand.target.node_id] += demand.waiting
        demand.finished.set()
        self._rounds.hear()
