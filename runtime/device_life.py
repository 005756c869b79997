"""One life of a device process: a child; a ring, a channel and a post that nobody else ever uses.

A restart makes a new one, so nothing of an earlier life can reach a later one. In order:

1. the ring, the channel and the post are made, the child is forked with them;
2. Hello within a time limit, from a child that speaks our protocol, was forked from a complete and
   single-threaded fork server; anything else is killed;
3. commands go out in order, events and token records come in, until the pidfd says it is gone;
4. what it said last is heard, the ring is emptied, and then whatever is open fails.

Twice a second its heartbeat is looked at (``hang_watch.py``): a process that hangs is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

import zmq.asyncio

from cortex.ipc import messages
from cortex.ipc.channel import SupervisorEnd
from cortex.ipc.descriptors import Descriptor
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.errors import NodeFailed, ProtocolError
from cortex.ipc.heartbeat import HeartbeatPage, HeartbeatReader
from cortex.ipc.messages import Command, Event, Failed, Hello
from cortex.ipc.post import Post
from cortex.ipc.ring import TokenConsumer, TokenRing
from cortex.ipc.taps import Tap
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_conversation import Conversation
from cortex.runtime.device_state import Cause
from cortex.runtime.fork_server import Child
from cortex.runtime.hang_watch import LOOK_SECONDS, Deadlines, HangWatch
from cortex.runtime.life_faults import SMALL_RING_RECORDS, LifeFaults

RING_RECORDS = 8192
HELLO_TIMEOUT_SECONDS = 60.0
LAST_WORDS_SECONDS = 0.02

OnHello = Callable[[Hello], None]
OnGone = Callable[[], None]


class Fork(Protocol):
    """Start a child that is a device process; ``ForkServer.fork``, but for tests."""

    def __call__(self, title: str, **arguments: Any) -> Awaitable[Child]:
        """Start it with the arguments of its main function; raise OSError where that fails."""


class Mailing(Protocol):
    """``cortex.ipc.post.Post``, as a group needs it."""

    def send(self, group: str, descriptors: Sequence[Descriptor], /) -> None:
        """Send them; raise OSError."""


class End(NamedTuple):
    """Why a life is over."""

    cause: Cause
    reason: str
    """In words."""


class Life(Protocol):
    """What ``DeviceProcess`` needs of one life."""

    conversation: Conversation

    @property
    def post(self) -> Mailing:
        """The way of descriptors into the child."""

    @property
    def pid(self) -> int | None:
        """The child's process number, once it is forked."""

    @property
    def cause(self) -> Cause | None:
        """Why it ends, as far as that is known yet."""

    async def run(self, on_hello: OnHello, on_gone: OnGone) -> End:
        """Live; return why it ended. *on_gone* comes first, then open ends fail."""

    def kill(self, cause: Cause, reason: str) -> None:
        """End it at once; the first cause and reason are those of its end.

        But for a peer's fault: what the process has said of itself, or its own end, counts more.
        """


class DeviceLife:
    """A life in a real child."""

    def __init__(
        self,
        spec: DeviceSpec,
        ids: itertools.count[int],
        *,
        fork: Fork,
        context: zmq.asyncio.Context,
        tap: Tap,
        log_level: str = "info",
        deadlines: Deadlines = Deadlines(),  # noqa: B008 - frozen
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        hello_timeout_seconds: float = HELLO_TIMEOUT_SECONDS,
        faults: LifeFaults | None = None,
    ) -> None:
        self.conversation = Conversation(self._queue, ids)
        self._spec = spec
        self._fork = fork
        self._tap = tap
        self._log_level = log_level
        self._deadlines = deadlines
        self._options = options
        self._hello_timeout_seconds = hello_timeout_seconds
        self._faults = faults
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        has_small_ring = faults is not None and faults.has_small_ring
        self._ring = TokenRing(SMALL_RING_RECORDS if has_small_ring else RING_RECORDS)
        self._consumer = TokenConsumer(self._ring)
        self._heartbeat = HeartbeatPage()
        self._beats = HeartbeatReader(self._heartbeat)
        self._channel = SupervisorEnd(context)
        self.post = Post()
        self._child: Child | None = None
        self._end: End | None = None

    @property
    def pid(self) -> int | None:
        """The child's process number, once it is forked."""
        return None if self._child is None else self._child.pid

    @property
    def cause(self) -> Cause | None:
        """Why it ends, as far as that is known yet."""
        return None if self._end is None else self._end.cause

    async def run(self, on_hello: OnHello, on_gone: OnGone) -> End:
        """Live; return why it ended. *on_gone* comes first, then open ends fail."""
        loop, ring = asyncio.get_running_loop(), self._consumer.fileno()
        look = self._faults.looking(ring, self._empty_ring) if self._faults else self._empty_ring
        loop.add_reader(ring, look)
        try:
            if await self._be_forked():
                await self._talk_until_gone(on_hello, on_gone)
            else:
                on_gone()
        finally:
            end = self._ends(Cause.ASKED, "the supervisor stopped")
            self._empty_ring()
            loop.remove_reader(ring)
            self.conversation.end(NodeFailed(end.reason))
            self._close()
        return end

    def kill(self, cause: Cause, reason: str) -> None:
        """End it at once; the first cause and reason are those of its end, but for a peer's."""
        if cause is Cause.PEER and self._child is not None and self._child.is_gone():
            return  # it went first: its end is its own, and is heard of in a moment
        self._ends(cause, reason)

    def _ends(self, cause: Cause, reason: str) -> End:
        is_its_own = cause is Cause.FAILED and self.cause is Cause.PEER
        if self._end is None or is_its_own:
            self._end = End(cause, reason)
        if self._child is not None:
            self._child.kill()
        return self._end

    @property
    def _is_over(self) -> bool:
        return self._end is not None or self._child is None or self._child.gone.done()

    def _close(self) -> None:
        self._consumer.close()
        self._ring.close()
        self._beats.close()
        self._heartbeat.close()
        self._channel.close()
        self.post.close()
        if self._faults:
            self._faults.end()

    async def _be_forked(self) -> bool:
        """Return whether there is a child now."""
        spec = self._spec
        try:
            self._child = await self._fork(
                f"neuron {spec.name}",
                device_name=spec.name,
                memory_bytes=spec.memory_bytes,
                threads=spec.threads,
                options=self._options,
                address=self._channel.address,
                ring=self._ring,
                heartbeat=self._heartbeat,
                post=self.post.letters,
                tap_directory=self._tap.directory,
                log_level=self._log_level,
                test_faults=self._faults.spelled if self._faults else "",
            )
        except OSError as exc:
            words = f"the device process of {spec.name} cannot be started: {exc}"
            self.kill(Cause.NOT_STARTED, words)
            return False
        self.post.letters.close()
        if self._end is not None:  # somebody ended this life while it began
            self._child.kill()
        return True

    async def _talk_until_gone(self, on_hello: OnHello, on_gone: OnGone) -> None:
        assert self._child is not None, "it has been forked"
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._listen(on_hello))
            sending = tasks.create_task(self._send_queued())
            watching = tasks.create_task(self._watch())
            await self._child.gone
            watching.cancel()
            on_gone()
            await asyncio.wait([listening], timeout=LAST_WORDS_SECONDS)
            listening.cancel()
            sending.cancel()
            code = await self._child.exit_code()
            self._ends(Cause.DIED, f"the device process of {self._spec.name} {_ended(code)}")

    async def _watch(self) -> None:
        watch = HangWatch(self._beats.last, self._deadlines, time.monotonic())
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            hang = watch.look(time.monotonic(), is_owed=self.conversation.is_open)
            if hang is not None:
                self.kill(Cause.HUNG, f"the device process of {self._spec.name} was killed: {hang}")

    async def _listen(self, on_hello: OnHello) -> None:
        try:
            hello = await self._hello()
            if not self._is_over:  # else READY would be said of a process that is gone
                on_hello(hello)
            while True:
                self._hear(await self._channel.receive())
        except ProtocolError as exc:
            self.kill(Cause.PROTOCOL, str(exc))

    async def _hello(self) -> Hello:
        """Return the child's Hello; raise ProtocolError for none, or one that will not do."""
        name = self._spec.name
        try:
            async with asyncio.timeout(self._hello_timeout_seconds):
                event = await self._channel.receive()
        except TimeoutError:
            raise ProtocolError(
                f"the device process of {name} said no Hello in {self._hello_timeout_seconds:g} s"
            ) from None
        self._publish("event", event)
        if isinstance(event, Failed):
            raise ProtocolError(f"the device process of {name} failed: {event.detail}")
        if not isinstance(event, Hello):
            raise ProtocolError(f"the device process of {name} began with {_op(event)}, not hello")
        refuse_hello(event)
        return event

    def _hear(self, event: Event) -> None:
        self._publish("event", event)
        self._empty_ring()  # what the ring still holds came before
        self.conversation.hear(event)
        if isinstance(event, Failed) and is_of_process(event):
            words = f"the device process of {self._spec.name} failed: {event.detail}"
            self._ends(Cause.PEER if event.code == messages.PEER_LOST else Cause.FAILED, words)

    def _empty_ring(self) -> None:
        self.conversation.receive(self._consumer.take())

    def _queue(self, command: Command) -> None:
        self._commands.put_nowait(command)

    async def _send_queued(self) -> None:
        send = self._faults.sending(self._channel) if self._faults else self._channel.send
        while True:
            command = await self._commands.get()
            self._publish("command", command)
            await send(command)

    def _publish(self, direction: str, message: Command | Event) -> None:
        self._tap.publish(
            f"{direction}.{_op(message)}", {"device": self._spec.name, direction: message}
        )


def is_of_process(failed: Failed) -> bool:
    """Whether the whole process cannot go on: it says so, or answers nobody knows what."""
    return failed.fatal or (failed.command_id is None and failed.sequence_id is None)


def refuse_hello(hello: Hello) -> None:
    """Raise ProtocolError, in words, for a child that must not be used."""
    messages.refuse_other_protocol(hello)
    if not hello.preloaded:
        raise ProtocolError(
            "the fork server could not import cortex.runtime.preload: is the package installed, "
            "with its neuron extra?"
        )
    if hello.server_threads != 1:
        raise ProtocolError(
            f"the fork server has {hello.server_threads} threads after its imports, not 1: "
            "what is forked from it may hang"
        )


def _op(message: Command | Event) -> str:
    return str(message.__struct_config__.tag)


def _ended(code: int | None) -> str:
    """Say how a process ended, given multiprocessing's exit code."""
    if code is None:
        return "is gone; how is unknown, because its fork server died too"
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
