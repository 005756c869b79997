"""The supervisor's handle on one device, through all the lives of its process.

It owns the device's state (the table in ``device_state.py``): it lets one life follow another
(``device_life.py``), counts failures, waits between them, and gives up after too many. Nobody else
writes the state; ``on_change`` tells the supervisor of every change, as it happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import structlog

from cortex.ipc import node_api
from cortex.ipc.descriptors import Descriptor
from cortex.ipc.errors import ApiError, NodeFailed, PeerGone, Recovering, ShuttingDown
from cortex.ipc.messages import (
    CacheCleared,
    ClearPrefixCache,
    Command,
    EngineReport,
    Event,
    Hello,
    SamplingParams,
    Shutdown,
)
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_conversation import Progress, Refused, Running, api_error
from cortex.runtime.device_life import Life
from cortex.runtime.device_state import (
    Cause,
    On,
    State,
    after,
    backoff_seconds,
    loss,
    public,
    recent,
)
from cortex.runtime.generation import Generation
from cortex.runtime.pending_vector import PendingVector
from cortex.runtime.pulse import Pulse

Clock = Callable[[], float]
CLEAR_TIMEOUT_SECONDS = 60.0
"""It is obeyed between two steps."""
_log = structlog.get_logger()


class DeviceProcess:
    """A device: one life after another, until it is stopped."""

    def __init__(
        self,
        spec: DeviceSpec,
        begin_life: Callable[[DeviceSpec, itertools.count[int]], Life],
        *,
        clock: Clock = time.monotonic,
        backoff: Callable[[int], float] = backoff_seconds,
    ) -> None:
        self.spec = spec
        self.cycles = 0
        """Loads and unloads that this life has gone through; the supervisor counts them."""
        self.losses: Counter[str] = Counter()
        """How often a life has ended before the stop, by ``Cause``."""
        self.failure: str | None = None
        """Why the last life ended, if it should not have."""
        self.hello: Hello | None = None
        """What the device process said first in this life; None until then."""
        self.on_change: Callable[[DeviceProcess, State], None] = lambda _device, _before: None
        self._begin_life = begin_life
        self._clock = clock
        self._backoff = backoff
        self._ids = itertools.count(1)
        self._state = State.STARTING
        self._changed = Pulse()
        self._failures: list[float] = []
        self._losses_at: list[float] = []
        """The failures, and the losses that were a peer's fault."""
        self._life: Life | None = None
        self._is_by_peer = False
        """Whether the life that ends seems to do so for another device."""
        self._hurry = asyncio.Event()
        """Somebody asked for a restart or the stop: do not wait, and count no failure."""

    @property
    def state(self) -> node_api.DeviceState:
        """The public name of the state."""
        return public(self._state)

    @property
    def is_ready(self) -> bool:
        """Whether it takes commands now."""
        return self._state is State.READY

    @property
    def is_poisoned(self) -> bool:
        """Whether it was given up."""
        return self._state is State.POISONED

    @property
    def pid(self) -> int | None:
        """The process number of the child, if there is one."""
        return None if self._life is None else self._life.pid

    @property
    def restarts(self) -> int:
        """How often a life has ended before the stop."""
        return self.losses.total()

    @property
    def running(self) -> list[Running]:
        """The generations and embeddings that the device works on."""
        return self._life.conversation.running if self._life else []

    async def run(self) -> None:
        """Live until stopped; the supervisor runs this as a task for as long as it lives itself."""
        try:
            while self._state is not State.STOPPED:
                if self._state is State.STOPPING:
                    self._advance(On.LOST)
                elif self._state is State.POISONED:
                    await self._hurry.wait()
                    self._hurry.clear()
                else:
                    await self._live()
                    await self._pause()
        finally:
            if self._state is not State.STOPPED:  # cancelled: nobody may wait for it any more
                self._advance(On.STOP)
                self._advance(On.LOST)

    def refuse_if_lost_for_good(self) -> None:
        """Raise NodeFailed or ShuttingDown where it will not come back by itself."""
        name = self.spec.name
        if self._state is State.POISONED:
            raise NodeFailed(
                f"device {name} was given up after too many failures, the last one: {self.failure}"
            )
        if self._state in {State.STOPPING, State.STOPPED}:
            raise ShuttingDown(f"device {name} is being stopped")

    async def become_ready(self) -> None:
        """Return once it takes commands; raise NodeFailed or ShuttingDown if it never will."""
        await self._changed.until(lambda: self._state not in {State.STARTING, State.RESTARTING})
        self._refuse_unless_ready()

    async def ask(
        self,
        question: Callable[[int], Command],
        *,
        timeout_seconds: float,
        progress: Progress | None = None,
    ) -> Event:
        """Send ``question(command_id)``, return the answer.

        Raise Refused where it is a Failed, PeerGone where the process dies before. One that does
        not answer in time is killed.
        """
        self._refuse_unless_ready()
        life = self._life
        assert life is not None, "a ready device has a life"
        late = asyncio.get_running_loop().call_later(
            timeout_seconds,
            life.kill,
            Cause.HUNG,
            f"the device process of {self.spec.name} gave no answer in {timeout_seconds:g} s",
        )
        try:
            return await life.conversation.ask(question, progress)
        finally:
            late.cancel()

    def tell(self, command: Callable[[int], Command]) -> None:
        """Send ``command(command_id)``, if anybody is there; its answer is not waited for."""
        if self.is_ready and self._life is not None:
            self._life.conversation.tell(command)

    def send_descriptors(self, group: str, descriptors: Sequence[Descriptor]) -> None:
        """Send what the device needs to be in *group*; raise PeerGone where it is lost."""
        if not self.is_ready or self._life is None:
            raise PeerGone(f"device {self.spec.name} is lost")
        try:
            self._life.post.send(group, descriptors)
        except OSError as exc:
            raise PeerGone(f"device {self.spec.name} takes no post: {exc}") from exc

    def generate(
        self,
        model_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        priority: int = 0,
    ) -> Generation:
        """Start a sequence; raise Recovering, NodeFailed or ShuttingDown where that cannot be."""
        self._refuse_unless_ready()
        assert self._life is not None, "a ready device has a life"
        return self._life.conversation.generate(model_id, prompt_token_ids, sampling, priority)

    def embed(
        self, model_id: str, prompt_token_ids: list[int], pooling: Literal["last", "mean"]
    ) -> PendingVector:
        """Start an embedding; raise what ``generate`` does."""
        self._refuse_unless_ready()
        assert self._life is not None, "a ready device has a life"
        return self._life.conversation.embed(model_id, prompt_token_ids, pooling)

    async def clear_prefix_cache(self, model_id: str) -> int:
        """Return how many blocks were forgotten; raise what ``generate`` does."""
        try:
            answer = await self.ask(
                lambda command_id: ClearPrefixCache(command_id, model_id),
                timeout_seconds=CLEAR_TIMEOUT_SECONDS,
            )
        except Refused as exc:
            raise api_error(exc.failed) from exc
        except PeerGone as exc:
            raise NodeFailed(str(exc)) from exc
        assert isinstance(answer, CacheCleared), f"ClearPrefixCache was answered by {answer}"
        return answer.blocks

    def of_model(self, model_id: str) -> list[Running]:
        """Return the generations and embeddings of *model_id* that the device works on."""
        return self._life.conversation.of_model(model_id) if self._life else []

    def report_of(self, model_id: str) -> EngineReport | None:
        """Return what this life said last of a model's engine; None where it said nothing."""
        return self._life.conversation.reports.get(model_id) if self._life else None

    def fail_model(self, model_id: str, error: ApiError) -> None:
        """End every generation and embedding of *model_id* with *error*."""
        if self._life is not None:
            self._life.conversation.fail_model(model_id, error)

    def restart(self) -> None:
        """End this life, if any, and begin another at once; earlier failures are forgotten."""
        if self._state in {State.STOPPING, State.STOPPED}:
            self.refuse_if_lost_for_good()
        self._failures.clear()
        self._losses_at.clear()
        self._hurry.set()
        self._advance(On.RESTART)
        self.end_life(f"device {self.spec.name} was restarted by an operator")

    def end_with(self, peer: str) -> None:
        """End this life, because *peer* is lost, another rank of a group; no failure of its own."""
        if not self.is_ready or self._life is None:
            return
        self._life.kill(
            Cause.PEER, f"device {self.spec.name} was ended with {peer}, which shares its models"
        )
        self._advance(On.LOST)

    def end_life(self, reason: str) -> None:
        """Kill the process, if there is one; somebody asked for it."""
        if self._life is not None:
            self._life.kill(Cause.ASKED, reason)

    async def stop(self, grace_seconds: float) -> None:
        """End it in order: Shutdown, SIGKILL after *grace_seconds*. Returns when it is stopped."""
        if self._state is State.STOPPED:
            return
        was_ready = self.is_ready
        self._advance(On.STOP)
        self._hurry.set()
        if was_ready and self._life is not None:
            self._life.conversation.tell(Shutdown)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await self._until_stopped()
        self.end_life(f"device {self.spec.name} was stopped")
        await self._until_stopped()

    async def _until_stopped(self) -> None:
        await self._changed.until(lambda: self._state is State.STOPPED)

    async def _live(self) -> None:
        life = self._life = self._begin_life(self.spec, self._ids)
        self.cycles = 0
        try:
            end = await life.run(self._greeted, self._lost)
        finally:
            self._life = None
        self._count_late(end.cause)
        if self._state is not State.STOPPED:
            self.failure = end.reason
            self.losses[end.cause] += 1
            _log.warning(
                "device process lost",
                device=self.spec.name,
                cause=end.cause,
                reason=end.reason,
                state=self._state,
            )

    async def _pause(self) -> None:
        """Wait before the next life, unless somebody asked for it at once."""
        if self._state is State.RESTARTING:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._backoff(len(self._losses_at))):
                    await self._hurry.wait()
        if self._state is State.RESTARTING:
            self._hurry.clear()

    def _greeted(self, hello: Hello) -> None:
        self.hello = hello
        self._advance(On.HELLO)
        _log.info("device process ready", device=self.spec.name, process=hello.pid)

    def _lost(self) -> None:
        """The process is gone, or never came; what it owed fails right after."""
        self.hello = None
        if self._state is State.STOPPING:
            self._advance(On.LOST)
        elif not self._hurry.is_set():  # else it was asked for: RESTARTING already, and no failure
            now = self._clock()
            self._losses_at = [*recent(self._losses_at, now), now]
            self._is_by_peer = self._life is not None and self._life.cause is Cause.PEER
            self._advance(On.LOST if self._is_by_peer else self._count_failure())

    def _count_failure(self) -> On:
        now = self._clock()
        self._failures = [*recent(self._failures, now), now]
        return loss(self._failures)

    def _count_late(self, cause: Cause) -> None:
        """Count what looked like a peer's fault until its own last words were heard."""
        if self._is_by_peer and cause is not Cause.PEER and self._state is State.RESTARTING:
            self._advance(self._count_failure())
        self._is_by_peer = False

    def _advance(self, on: On) -> None:
        before, self._state = self._state, after(self._state, on)
        self._changed.beat()
        self.on_change(self, before)

    def _refuse_unless_ready(self) -> None:
        self.refuse_if_lost_for_good()
        if self._state is not State.READY:
            raise Recovering(f"device {self.spec.name} is {self.state}", retry_after_seconds=1)
