"""One life over the real channel and the real ring; only the process is a double."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq.asyncio

from cortex.ipc.channel import DeviceEnd
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.errors import NodeFailed
from cortex.ipc.heartbeat import Activity, HeartbeatWriter
from cortex.ipc.messages import (
    PEER_LOST,
    PROTOCOL_VERSION,
    Command,
    Failed,
    Generate,
    Hello,
    Ping,
    Pong,
    SamplingParams,
)
from cortex.ipc.plan_ring import PlanRing
from cortex.ipc.post import Letters
from cortex.ipc.ring import Flag, TokenProducer, TokenRing
from cortex.ipc.taps import Tap
from cortex.runtime import device_life
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_life import DeviceLife, End
from cortex.runtime.device_state import Cause
from cortex.runtime.fork_server import Child
from cortex.runtime.hang_watch import Deadlines, HangWatch
from supervisor_fakes import eventually, hello, records

SPEC = DeviceSpec(0, "cpu:0", 2**30, 1)
OPTIONS = EngineOptions(speculation=False)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1)


class FakeChild:
    """A child that is gone when the test, or a kill, says so."""

    def __init__(self) -> None:
        self.pid = 4711
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.code: int | None = -9
        self.letters: Letters | None = None
        self.has_died = False
        """Whether it has, and the loop has not heard of that yet."""

    def is_gone(self) -> bool:
        return self.has_died

    def kill(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    async def exit_code(self) -> int | None:
        return self.code


@dataclass
class Wire:
    """The child's ends of a life, held by the test."""

    life: DeviceLife
    child: FakeChild
    arguments: dict[str, Any] = field(default_factory=dict)
    greeted: list[Hello] = field(default_factory=list)
    end: DeviceEnd = field(init=False)
    producer: TokenProducer = field(init=False)
    over: asyncio.Task[End] = field(init=False)
    beats: HeartbeatWriter = field(init=False)

    async def begin(self, tasks: asyncio.TaskGroup) -> None:
        self.over = tasks.create_task(self.life.run(self.greeted.append, lambda: None))
        await eventually(lambda: self.arguments, "the fork")
        ring: TokenRing = self.arguments["ring"]
        self.end = DeviceEnd(self.arguments["address"])
        self.producer = TokenProducer(ring)
        self.beats = HeartbeatWriter(self.arguments["heartbeat"])

    async def command(self) -> Command:
        got: list[Command | None] = [None]

        def arrived() -> bool:
            got[0] = self.end.receive_waiting()
            return got[0] is not None

        await eventually(arrived, "a command")
        assert got[0] is not None
        return got[0]

    def close(self) -> None:
        self.child.kill()
        self.end.close()
        self.producer.close()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with wired(Deadlines()) as wire:
        yield wire


@pytest.fixture
async def hasty() -> AsyncIterator[Wire]:
    """A life whose process must beat ten times a second."""
    async with wired(Deadlines(step_seconds=0.1)) as wire:
        yield wire


@asynccontextmanager
async def wired(deadlines: Deadlines, hello_timeout_seconds: float = 0.2) -> AsyncIterator[Wire]:
    context = zmq.asyncio.Context()
    child, arguments = FakeChild(), dict[str, Any]()

    async def fork(title: str, **given: Any) -> Child:
        arguments.update(given)
        child.letters = Letters(arguments.pop("post"))
        return child

    life = DeviceLife(
        SPEC,
        itertools.count(1),
        fork=fork,
        context=context,
        tap=Tap(None, "supervisor"),
        deadlines=deadlines,
        options=OPTIONS,
        hello_timeout_seconds=hello_timeout_seconds,
    )
    async with asyncio.TaskGroup() as tasks:
        wire = Wire(life, child, arguments)
        await wire.begin(tasks)
        yield wire
        wire.close()
        assert child.letters is not None
        child.letters.close()
    context.destroy(linger=0)


async def greet(wire: Wire) -> None:
    wire.end.send(hello())
    await eventually(lambda: wire.greeted, "the greeting")


async def test_it_forks_with_everything_a_device_process_needs(wire: Wire) -> None:
    wire.arguments.pop("address")
    wire.arguments.pop("ring")
    wire.arguments.pop("heartbeat")

    assert wire.arguments == {
        "device_name": "cpu:0",
        "memory_bytes": 2**30,
        "threads": 1,
        "options": OPTIONS,
        "tap_directory": None,
        "log_level": "info",
        "test_faults": "",
    }


async def test_it_talks_after_hello(wire: Wire) -> None:
    await greet(wire)

    async with asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(wire.life.conversation.ask(Ping))
        assert await wire.command() == Ping(1)
        wire.end.send(Pong(1))

    assert answer.result() == Pong(1)


async def test_tokens_come_from_the_ring(wire: Wire) -> None:
    await greet(wire)
    generation = wire.life.conversation.generate("m", [1, 2], GREEDY)
    assert await wire.command() == Generate(1, 1, "m", [1, 2], GREEDY)
    wire.producer.publish(records(1, [5, 6], Flag.STOP))

    assert await anext(generation) == records(1, [5, 6], Flag.STOP)


async def test_tokens_written_before_the_death_arrive_before_the_error(wire: Wire) -> None:
    await greet(wire)
    generation = wire.life.conversation.generate("m", [1, 2], GREEDY)
    wire.producer.publish(records(1, [5]))
    wire.child.kill()

    assert await anext(generation) == records(1, [5])
    with pytest.raises(NodeFailed, match="cpu:0 was killed by SIGKILL"):
        await anext(generation)


async def test_tokens_written_before_a_failed_arrive_before_it(wire: Wire) -> None:
    await greet(wire)
    generation = wire.life.conversation.generate("m", [1, 2], GREEDY)
    wire.producer.publish(records(1, [5]))
    wire.end.send(Failed("unhealthy_logits", "a NaN", sequence_id=1))

    assert await anext(generation) == records(1, [5])
    with pytest.raises(NodeFailed, match="a NaN"):
        await anext(generation)


async def test_a_hello_that_its_process_did_not_outlive_greets_nobody(wire: Wire) -> None:
    wire.end.send(hello())
    wire.child.kill()

    assert "was killed by SIGKILL" in (await wire.over).reason
    assert wire.greeted == []


async def test_what_it_says_last_is_the_reason(wire: Wire) -> None:
    await greet(wire)
    wire.end.send(Failed("device_lost", "an Xid", fatal=True))
    wire.child.kill()

    assert (await wire.over).reason == "the device process of cpu:0 failed: an Xid"


async def test_a_fatal_failure_does_not_wait_for_the_exit(wire: Wire) -> None:
    await greet(wire)
    wire.end.send(Failed("device_lost", "an Xid", fatal=True))

    assert "an Xid" in (await wire.over).reason


async def test_a_failure_of_nothing_in_particular_ends_the_life(wire: Wire) -> None:
    await greet(wire)
    wire.end.send(Failed("protocol_error", "not a command"))

    assert "not a command" in (await wire.over).reason


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (Hello(99, "cpu:0", 1, True, 1, "2"), "speaks protocol 99"),
        (Hello(PROTOCOL_VERSION, "cpu:0", 1, False, 0, "2"), "could not import"),
        (Hello(PROTOCOL_VERSION, "cpu:0", 1, True, 3, "2"), "has 3 threads"),
        (Pong(1), "began with pong"),
        (Failed("internal_error", "no such device", fatal=True), "no such device"),
    ],
)
async def test_a_child_that_must_not_be_used_is_killed(
    wire: Wire, greeting: Hello | Pong | Failed, why: str
) -> None:
    wire.end.send(greeting)

    assert why in (await wire.over).reason
    assert wire.greeted == []


async def test_a_child_that_says_no_hello_is_killed(wire: Wire) -> None:
    assert "no Hello in 0.2 s" in (await wire.over).reason


async def test_what_is_not_an_event_ends_the_life(wire: Wire) -> None:
    await greet(wire)
    wire.end._socket.send(b"\x01")

    assert "not an event" in (await wire.over).reason


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (-11, "was killed by SIGSEGV"),
        (-200, "was killed by signal 200"),
        (71, "exited with status 71"),
        (None, "is gone; how is unknown, because its fork server died too"),
    ],
)
async def test_the_reason_says_how_it_ended(wire: Wire, code: int | None, how: str) -> None:
    wire.child.code = code
    wire.child.kill()

    assert (await wire.over).reason == f"the device process of cpu:0 {how}"


async def test_a_child_that_cannot_be_forked_is_a_reason_too() -> None:
    context = zmq.asyncio.Context()

    async def fork(title: str, **_arguments: Any) -> Child:
        raise OSError("no memory")

    life = DeviceLife(
        SPEC, itertools.count(1), fork=fork, context=context, tap=Tap(None, "supervisor")
    )
    gone: list[bool] = []
    end = await life.run(lambda _: None, lambda: gone.append(True))
    context.destroy(linger=0)

    assert (end.reason, gone) == (
        "the device process of cpu:0 cannot be started: no memory",
        [True],
    )


async def test_a_life_leaves_no_descriptor_open(wire: Wire) -> None:
    await greet(wire)
    ring: TokenRing = wire.arguments["ring"]
    wire.child.kill()
    await wire.over

    assert (ring.memory.fd, ring.filled.fd, ring.freed.fd) == (-1, -1, -1)


async def test_a_life_that_is_killed_while_it_is_forked_ends_the_child() -> None:
    context, child, may_fork = zmq.asyncio.Context(), FakeChild(), asyncio.Event()

    async def fork(title: str, **_arguments: Any) -> Child:
        await may_fork.wait()
        return child

    life = DeviceLife(
        SPEC, itertools.count(1), fork=fork, context=context, tap=Tap(None, "supervisor")
    )
    async with asyncio.TaskGroup() as tasks:
        over = tasks.create_task(life.run(lambda _: None, lambda: None))
        life.kill(Cause.ASKED, "stopped early")
        may_fork.set()
    context.destroy(linger=0)

    assert over.result() == End(Cause.ASKED, "stopped early")
    assert child.gone.done()


async def test_a_process_that_was_gone_already_is_not_ended_for_another(wire: Wire) -> None:
    await greet(wire)
    wire.child.has_died = True

    wire.life.kill(Cause.PEER, "cpu:1 was lost")
    assert wire.life.cause is None
    wire.child.kill()
    end = await wire.over

    assert end.cause is Cause.DIED


async def test_what_a_process_says_of_itself_counts_more_than_a_peers_end(wire: Wire) -> None:
    await greet(wire)

    wire.life.kill(Cause.PEER, "cpu:1 was lost")
    wire.end.send(Failed("internal_error", "a bug", fatal=True))
    end = await wire.over

    assert end == End(Cause.FAILED, "the device process of cpu:0 failed: a bug")


async def test_a_rank_whose_collective_broke_ends_as_a_peer(wire: Wire) -> None:
    await greet(wire)

    wire.end.send(Failed(PEER_LOST, "the others do not answer", fatal=True))
    end = await wire.over

    assert end == End(Cause.PEER, "the device process of cpu:0 failed: the others do not answer")


async def test_a_child_gets_its_post(wire: Wire) -> None:
    ring = PlanRing(1)

    wire.life.post.send("0-1.1", ring.descriptors(1))
    ring.close()

    assert wire.child.letters is not None
    taken = wire.child.letters.take("0-1.1") or []
    assert len(taken) == 3
    for descriptor in taken:
        descriptor.close()


async def test_the_post_of_a_child_that_is_gone_is_not_taken(wire: Wire) -> None:
    assert wire.child.letters is not None

    wire.child.letters.close()

    with pytest.raises(OSError, match=r"pipe|reset|connect"):
        wire.life.post.send("0-1.1", [])


async def test_commands_and_events_are_published_on_the_tap(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        wire.life._tap, "publish", lambda topic, message: published.append((topic, message))
    )
    await greet(wire)
    wire.life.conversation.tell(Ping)
    await wire.command()

    assert published == [
        ("event.hello", {"device": "cpu:0", "event": hello()}),
        ("command.ping", {"device": "cpu:0", "command": Ping(1)}),
    ]


async def test_a_process_that_hangs_in_a_step_is_killed(hasty: Wire) -> None:
    await greet(hasty)
    generation = hasty.life.conversation.generate("m", [1], GREEDY)
    hasty.beats.main(Activity.STEPPING)
    end = await hasty.over

    assert end.cause is Cause.HUNG
    with pytest.raises(NodeFailed, match=r"was killed: it hung: a step took more than 0\.1 s"):
        await anext(generation)


async def test_a_process_that_takes_no_command_is_killed(hasty: Wire) -> None:
    await greet(hasty)
    hasty.life.conversation.generate("m", [1], GREEDY)

    assert (await hasty.over).reason.endswith("it hung: it took no command for 0.1 s")


async def test_a_process_that_beats_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []
    beats: list[HeartbeatWriter] = []

    class Watch(HangWatch):
        def look(self, now: float, *, is_owed: bool) -> str | None:
            beats[0].main(Activity.STEPPING)
            found.append(super().look(now, is_owed=is_owed))
            return found[-1]

    monkeypatch.setattr(device_life, "HangWatch", Watch)
    async with wired(Deadlines(step_seconds=0.1), 20.0) as wire:
        beats.append(wire.beats)
        await eventually(lambda: len(found) == 2, "two looks")

    assert found == [None, None]
