"""Real processes, forked from a real fork server without torch; killed in every way."""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import zmq.asyncio

import supervised_child
from cortex.ipc.channel import private_address
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.errors import NodeFailed
from cortex.ipc.heartbeat import HeartbeatPage
from cortex.ipc.messages import Ping, Pong
from cortex.ipc.post import Post
from cortex.ipc.ring import Flag, TokenRing
from cortex.ipc.taps import Tap
from cortex.runtime import fork_server
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_life import DeviceLife
from cortex.runtime.device_process import Clock, DeviceProcess
from cortex.runtime.device_state import FAILURE_WINDOW_SECONDS, Cause
from cortex.runtime.fork_server import ForkServer
from cortex.runtime.hang_watch import Deadlines
from cortex.runtime.host import resident_bytes
from forked import forking, kill
from supervisor_bench import GREEDY
from supervisor_fakes import eventually

RESTART_SECONDS = 3.0  # of which most is the test runner, which every child imports again


@pytest.fixture(scope="module")
def prepared() -> Iterator[None]:
    """A fork server for this process; gone again after the module's tests."""
    with forking("light_preload"):
        yield


@pytest.fixture
async def server(prepared: None) -> AsyncIterator[ForkServer]:
    server = ForkServer(
        supervised_child.main, preload="light_preload", start_timeout_seconds=RESTART_SECONDS
    )
    yield server
    server.close()


class Devices:
    """Two real device processes, but for the device."""

    def __init__(
        self, server: ForkServer, context: zmq.asyncio.Context, clock: Clock = time.monotonic
    ) -> None:
        self._server = server
        self._context = context
        self.all = [
            DeviceProcess(
                DeviceSpec(i, f"cpu:{i}", 1, 1),
                self._begin,
                clock=clock,
                backoff=lambda _: 0.0,
            )
            for i in range(2)
        ]

    def _begin(self, spec: DeviceSpec, ids: itertools.count[int]) -> DeviceLife:
        tap = Tap(None, "supervisor")
        return DeviceLife(
            spec,
            ids,
            fork=self._server.fork,
            context=self._context,
            tap=tap,
            deadlines=Deadlines(step_seconds=1.0),
        )


@pytest.fixture
async def devices(server: ForkServer) -> AsyncIterator[list[DeviceProcess]]:
    context = zmq.asyncio.Context()
    forgetful = partial(next, itertools.count(0.0, FAILURE_WINDOW_SECONDS))
    devices = Devices(server, context, clock=forgetful).all
    async with asyncio.TaskGroup() as tasks:
        for device in devices:
            tasks.create_task(device.run())
        for device in devices:
            await device.become_ready()
        yield devices
        await asyncio.gather(*(device.stop(5.0) for device in devices))
    context.destroy(linger=0)


def _descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would open one more


def _title(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


@pytest.fixture
def unheard() -> Iterator[dict[str, object]]:
    """Arguments of a child that nobody listens to."""
    ring, heartbeat, post = TokenRing(8), HeartbeatPage(), Post()
    yield {
        "device_name": "cpu:9",
        "memory_bytes": 1,
        "threads": 1,
        "address": private_address(),
        "ring": ring,
        "heartbeat": heartbeat,
        "tap_directory": None,
        "log_level": "info",
        "test_faults": "",
        "options": EngineOptions(),
        "post": post.letters,
    }
    ring.close()
    heartbeat.close()
    post.close()


async def _has_restarted(device: DeviceProcess, before: int | None) -> None:
    async with asyncio.timeout(RESTART_SECONDS):
        await eventually(lambda: device.is_ready and device.pid != before, "the restart")


async def _killed_and_back(device: DeviceProcess) -> None:
    pid = device.pid
    kill(pid)
    await _has_restarted(device, pid)


def _resident_bytes() -> int:
    gc.collect()
    return resident_bytes(os.getpid()) or 0


def _shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def _children_of(pid: int | None) -> set[int]:
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


async def test_children_talk_and_carry_titles(
    server: ForkServer, devices: list[DeviceProcess]
) -> None:
    assert isinstance(await devices[1].ask(Ping, timeout_seconds=5), Pong)
    assert [_title(device.pid) for device in devices] == ["neuron cpu:0", "neuron cpu:1"]
    assert _title(server.pid) == "neuron fork server"


async def test_a_killed_child_is_noticed_and_comes_back(devices: list[DeviceProcess]) -> None:
    device, pid = devices[0], devices[0].pid
    began = time.monotonic()
    kill(pid)
    await eventually(lambda: not device.is_ready, "the loss")
    noticed_seconds = time.monotonic() - began
    await _has_restarted(device, pid)

    assert noticed_seconds < 0.5
    assert device.failure == "the device process of cpu:0 was killed by SIGKILL"
    assert devices[1].restarts == 0


async def test_a_child_killed_in_mid_stream_ends_the_stream_after_its_tokens(
    devices: list[DeviceProcess],
) -> None:
    generation = devices[0].generate("gil", [7, 8], GREEDY)
    got = await anext(generation)
    kill(devices[0].pid)

    assert [record.token_id for record in got] == [7, 8]
    with pytest.raises(NodeFailed, match="SIGKILL"):
        await anext(generation)


async def test_a_crash_says_so_and_spares_the_other_device(devices: list[DeviceProcess]) -> None:
    spared = devices[1].generate("m", [1], GREEDY)
    with pytest.raises(NodeFailed, match="SIGSEGV"):
        async for _ in devices[0].generate("crash", [1], GREEDY):
            pass

    batches = [batch async for batch in spared]
    assert batches[-1][-1].flags & Flag.STOP


async def test_a_killed_fork_server_takes_its_children_along_and_all_come_back(
    server: ForkServer, devices: list[DeviceProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "CRASH_LOOP_SECONDS", 0.0)
    before, pids = server.pid, [device.pid for device in devices]
    kill(before)
    for device, pid in zip(devices, pids, strict=True):
        await _has_restarted(device, pid)

    assert server.pid != before
    assert [device.restarts for device in devices] == [1, 1]


async def test_a_fork_server_that_dies_young_is_replaced_by_the_next_start(
    server: ForkServer, unheard: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "CRASH_LOOP_SECONDS", 3600.0)
    before = server.pid
    kill(before)
    await eventually(lambda: server._pidfd < 0, "the loss")
    child = await server.fork("neuron cpu:9", **unheard)
    child.kill()
    await child.gone

    assert server.pid != before


async def test_twenty_restarts_leave_no_descriptor_behind(devices: list[DeviceProcess]) -> None:
    device = devices[0]
    device.restart()  # the first ones open what stays open: ZeroMQ's own, the executor's
    await device.become_ready()
    before = _descriptors()
    for _ in range(20):
        device.restart()
        await device.become_ready()
    await eventually(lambda: len(_descriptors()) <= len(before), "the last descriptors")

    assert device.restarts == 21
    assert len(_descriptors()) <= len(before)


async def test_a_hundred_kills_in_a_row_leave_nothing_behind(
    server: ForkServer, devices: list[DeviceProcess]
) -> None:
    device, spared = devices
    for _ in range(5):  # the first ones open, and allocate, what stays
        await _killed_and_back(device)
    descriptors, memory, files = _descriptors(), _resident_bytes(), _shared_memory()
    for _ in range(100):
        await _killed_and_back(device)
    await eventually(lambda: len(_descriptors()) <= len(descriptors), "the last descriptors")

    assert (device.losses, spared.losses) == ({Cause.DIED: 105}, {})
    assert {child.pid for child in multiprocessing.active_children()} == {device.pid, spared.pid}
    assert _children_of(server.pid) == {device.pid, spared.pid}
    assert _resident_bytes() < memory + 8 * 2**20
    assert _shared_memory() == files


async def test_a_child_that_hangs_with_the_interpreter_s_lock_is_killed_and_comes_back(
    devices: list[DeviceProcess],
) -> None:
    device = devices[0]
    generation = device.generate("gil", [7], GREEDY)
    await anext(generation)
    with pytest.raises(NodeFailed, match="it hung: a step took more than 1 s"):
        await anext(generation)

    await _has_restarted(device, None)
    assert (device.losses, devices[1].losses) == ({Cause.HUNG: 1}, {})


async def test_a_child_of_a_fork_server_that_could_not_import_is_refused(
    server: ForkServer,
) -> None:
    server._preload = "no_such_module"
    context = zmq.asyncio.Context()
    device = Devices(server, context).all[0]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(device.run())
        with pytest.raises(NodeFailed, match=r"could not import cortex\.runtime\.preload"):
            await device.become_ready()
        await device.stop(0.0)
    context.destroy(linger=0)

    assert device.restarts == 4


async def test_a_start_that_hangs_ends_in_time_and_the_next_one_works(
    server: ForkServer, unheard: dict[str, object]
) -> None:
    server._start_timeout_seconds = 0.2
    kill(server.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match=r"nothing in 0\.2 s"):
        await server.fork("neuron cpu:9", **unheard)

    server._start_timeout_seconds = RESTART_SECONDS
    child = await server.fork("neuron cpu:9", **unheard)
    child.kill()
    assert await child.exit_code() == -signal.SIGKILL


async def test_a_hanging_start_does_not_cost_other_devices_their_processes(
    server: ForkServer,
    unheard: dict[str, object],
) -> None:
    healthy = await server.fork("neuron cpu:8", **unheard)
    server._start_timeout_seconds = 0.2
    kill(server.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await server.fork("neuron cpu:9", **unheard)

    assert not healthy.gone.done()
    kill(server.pid, signal.SIGCONT)
    healthy.kill()
    await healthy.gone
    await eventually(lambda: not multiprocessing.active_children(), "the late child's end")


async def test_a_child_that_starts_after_its_start_was_cancelled_is_killed(
    server: ForkServer,
    unheard: dict[str, object],
) -> None:
    kill(server.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.fork("neuron cpu:9", **unheard), 0.1)
    kill(server.pid, signal.SIGCONT)

    await eventually(lambda: not server._starting, "the late start")
    await eventually(lambda: not multiprocessing.active_children(), "its end")


async def test_killing_a_child_that_is_gone_is_not_an_error(
    server: ForkServer, unheard: dict[str, object]
) -> None:
    child = await server.fork("neuron cpu:9", **unheard)
    child.kill()
    await child.gone
    child.kill()

    assert await child.exit_code() == -signal.SIGKILL
