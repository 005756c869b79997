"""A device through its lives: comes back, gives up in the end, and nobody waits in vain."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest

from cortex.ipc.errors import ModelNotFound, NodeFailed, PeerGone, Recovering, ShuttingDown
from cortex.ipc.messages import (
    ClearPrefixCache,
    EngineReport,
    Generate,
    Ping,
    Pong,
    SamplingParams,
    Shutdown,
)
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_process import DeviceProcess
from cortex.runtime.device_state import FAILURE_WINDOW_SECONDS, Cause, State
from supervisor_fakes import FakeClock, FakeDeviceProcess, FakeDevices, eventually

SPEC = DeviceSpec(0, "cpu:0", 2**30, 1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1)
GRACE = 5.0


class Bench:
    """A device with scripted lives, its clock, and the back-offs it took."""

    def __init__(self) -> None:
        self.lives = FakeDevices()
        self.clock = FakeClock()
        self.backoffs: list[int] = []
        self.states: list[State] = []
        self.device = DeviceProcess(
            SPEC, self.lives.begin, clock=self.clock, backoff=self._note_backoff
        )
        self.device.on_change = lambda _, before: self.states.append(before)

    def _note_backoff(self, failures: int) -> float:
        self.backoffs.append(failures)
        return 0.0

    async def dies(self) -> None:
        """Let the process die, and wait until the next life, if any, is ready."""
        lives = len(self.lives.lives[0])
        self.lives.now().dies()
        await eventually(
            lambda: (
                self.device.is_poisoned
                or (len(self.lives.lives[0]) > lives and self.device.is_ready)
            ),
            "the next life",
        )


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bench.device.run())
        yield bench
        await bench.device.stop(GRACE)


@pytest.fixture
async def device(bench: Bench) -> DeviceProcess:
    await bench.device.become_ready()
    return bench.device


async def test_it_is_ready_after_hello(bench: Bench, device: DeviceProcess) -> None:
    assert bench.states == [State.STARTING]
    assert (device.state, device.pid) == ("ready", 70001)
    assert device.hello is not None
    assert device.hello.device == "cpu:0"


async def test_a_question_is_answered(device: DeviceProcess) -> None:
    assert isinstance(await device.ask(Ping, timeout_seconds=5), Pong)


async def test_it_waits_after_losses_that_were_a_peers_fault_too(
    bench: Bench, device: DeviceProcess
) -> None:
    for _ in range(6):
        lives = len(bench.lives.lives[0])
        device.end_with("cpu:1")
        await eventually(partial(_lives_again, bench, lives), "another life")
        await device.become_ready()

    assert (device.is_poisoned, device.losses) == (False, {Cause.PEER: 6})
    assert bench.backoffs == [1, 2, 3, 4, 5, 6]


async def test_last_words_make_a_peers_fault_its_own(bench: Bench, device: DeviceProcess) -> None:
    for _ in range(4):
        await device.become_ready()
        life = bench.lives.now()
        life.last_cause = Cause.FAILED
        device.end_with("cpu:1")
        await eventually(partial(_is_over, bench, life), "its end")

    assert (device.is_poisoned, device.losses) == (True, {Cause.FAILED: 4})


def _is_over(bench: Bench, life: FakeDeviceProcess) -> bool:
    return bench.lives.now() is not life or bench.device.is_poisoned


def _lives_again(bench: Bench, lives: int) -> bool:
    return len(bench.lives.lives[0]) > lives


async def test_a_device_that_is_not_ready_is_not_ended_with_another(
    bench: Bench, device: DeviceProcess
) -> None:
    await bench.device.stop(GRACE)

    device.end_with("cpu:1")
    device.tell(Ping)

    assert device.losses == {}
    with pytest.raises(PeerGone):
        device.send_descriptors("g", [])


async def test_a_prefix_cache_is_cleared(bench: Bench, device: DeviceProcess) -> None:
    assert await device.clear_prefix_cache("m") == 7
    assert bench.lives.now().received == [ClearPrefixCache(1, "m")]


async def test_a_cache_that_the_device_does_not_know_is_no_fault_of_the_device(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.silent_on = {ClearPrefixCache}
    clearing = asyncio.ensure_future(device.clear_prefix_cache("m"))
    await eventually(lambda: bench.lives.now().received, "the command")

    command = bench.lives.now().last(ClearPrefixCache)
    bench.lives.now().refuses(command, "model_not_loaded", "m is not loaded on this device")

    with pytest.raises(ModelNotFound, match="not loaded"):
        await clearing


async def test_a_device_that_dies_before_it_clears_has_failed(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.silent_on = {ClearPrefixCache}
    clearing = asyncio.ensure_future(device.clear_prefix_cache("m"))
    await eventually(lambda: bench.lives.now().received, "the command")

    bench.lives.now().dies()

    with pytest.raises(NodeFailed, match="SIGKILL"):
        await clearing


async def test_what_a_life_said_of_its_models_dies_with_it(
    bench: Bench, device: DeviceProcess
) -> None:
    report = EngineReport("m", 1, 0, 64, 0, 0, 0)
    bench.lives.now().says(report)
    assert device.report_of("m") == report

    await bench.dies()

    assert device.report_of("m") is None


async def test_a_device_that_dies_comes_back_with_another_process(
    bench: Bench, device: DeviceProcess
) -> None:
    await bench.dies()

    assert (device.state, device.pid, device.restarts) == ("ready", 70002, 1)
    assert device.failure == "it was killed by SIGKILL"


async def test_an_open_question_ends_with_the_process(bench: Bench, device: DeviceProcess) -> None:
    bench.lives.silent_on = {Ping}
    asyncio.get_running_loop().call_soon(lambda: bench.lives.now().dies("segfault"))

    with pytest.raises(PeerGone, match="segfault"):
        await device.ask(Ping, timeout_seconds=5)


async def test_an_open_generation_ends_with_the_process(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.silent_on = {Generate}
    generation = device.generate("m", [1], GREEDY)
    bench.lives.now().dies("segfault")

    with pytest.raises(NodeFailed, match="segfault"):
        await anext(generation)


async def test_a_device_that_does_not_answer_in_time_is_killed(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.silent_on = {Ping}

    with pytest.raises(PeerGone, match="no answer in 0 s"):
        await device.ask(Ping, timeout_seconds=0)


async def test_the_back_off_grows_with_the_failures(bench: Bench, device: DeviceProcess) -> None:
    for _ in range(3):
        await bench.dies()

    assert bench.backoffs == [1, 2, 3]


async def test_the_fourth_failure_in_ten_minutes_poisons_it(
    bench: Bench, device: DeviceProcess
) -> None:
    for _ in range(4):
        await bench.dies()

    assert device.state == "poisoned"
    with pytest.raises(NodeFailed, match="cpu:0 was given up"):
        await device.become_ready()
    with pytest.raises(NodeFailed, match="killed by SIGKILL"):
        device.generate("m", [1], GREEDY)


async def test_failures_further_apart_do_not(bench: Bench, device: DeviceProcess) -> None:
    for _ in range(6):
        bench.clock.now += FAILURE_WINDOW_SECONDS / 3
        await bench.dies()

    assert device.state == "ready"


async def test_a_hello_that_never_comes_is_a_failure_too(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.starts = False
    await bench.dies()

    assert (device.state, device.failure) == ("poisoned", "it never said Hello")
    assert len(bench.lives.lives[0]) == 4


async def test_an_operator_can_restart_a_poisoned_device(
    bench: Bench, device: DeviceProcess
) -> None:
    for _ in range(4):
        await bench.dies()
    device.restart()
    await device.become_ready()

    assert device.pid == 70005


async def test_an_operators_restart_is_no_failure_and_forgets_earlier_ones(
    bench: Bench, device: DeviceProcess
) -> None:
    for _ in range(3):
        await bench.dies()
    device.restart()
    await device.become_ready()
    bench.backoffs.clear()
    await bench.dies()

    assert (device.state, bench.backoffs) == ("ready", [1])


async def test_an_operators_restart_cuts_the_back_off_short() -> None:
    bench = Bench()
    device = DeviceProcess(SPEC, bench.lives.begin, backoff=lambda _: 3600.0)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(device.run())
        await device.become_ready()
        bench.lives.now().dies()
        await eventually(lambda: device.pid is None, "the back-off")
        with pytest.raises(Recovering, match="restarting"):
            device.generate("m", [1], GREEDY)
        device.restart()
        await device.become_ready()
        await device.stop(GRACE)

    assert len(bench.lives.lives[0]) == 2


async def test_a_restart_while_it_dies_begins_the_next_life_at_once(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.now().dies()
    device.restart()
    await device.become_ready()

    assert (device.pid, device.restarts) == (70002, 1)


async def test_stopping_asks_before_it_kills(bench: Bench, device: DeviceProcess) -> None:
    await device.stop(GRACE)

    assert isinstance(bench.lives.now().received[-1], Shutdown)
    assert (device.state, device.restarts) == ("stopped", 0)


async def test_a_device_that_does_not_stop_in_time_is_killed(
    bench: Bench, device: DeviceProcess
) -> None:
    bench.lives.silent_on = {Shutdown}
    await device.stop(0.0)

    assert device.state == "stopped"


async def test_a_poisoned_device_can_be_stopped(bench: Bench, device: DeviceProcess) -> None:
    for _ in range(4):
        await bench.dies()
    await device.stop(GRACE)

    assert device.state == "stopped"


async def test_what_is_stopped_takes_nothing_more(bench: Bench, device: DeviceProcess) -> None:
    await device.stop(GRACE)
    await device.stop(GRACE)

    with pytest.raises(ShuttingDown):
        await device.ask(Ping, timeout_seconds=5)
    with pytest.raises(ShuttingDown):
        device.restart()


async def test_a_task_that_is_cancelled_leaves_nobody_waiting_for_the_stop() -> None:
    bench = Bench()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.device.run(), 0.01)

    await bench.device.stop(GRACE)

    assert bench.device.state == "stopped"
