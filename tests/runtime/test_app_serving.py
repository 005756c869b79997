"""The life of a neuron's HTTP side: bind, serve, drain, stop."""

import asyncio
import socket
from pathlib import Path

import aiohttp
import pytest
from structlog.testing import capture_logs

from cortex.ipc.taps import socket_path
from cortex.runtime.config import DeviceSpec, EngineConfig, NeuronConfig, TapsConfig
from cortex.runtime.routes import SERVICES, Services
from cortex.runtime.serving import CannotListen, Stop, _tap, bind, run, say_what_has_no_effect
from fake_node import FakeNode, application, says
from fakes import until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


class Running:
    """A neuron's HTTP side that runs, in front of a fake node."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.stop = Stop()
        self.services: Services = application(node)[SERVICES]
        self.listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def run(self, drain_seconds: float = 60.0) -> None:
        """Serve until stopped."""
        await run(self.services, self.listener, self.stop, drain_seconds, [])


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            bind("127.0.0.1", port)


def test_a_host_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(CannotListen, match=r"cannot listen on nowhere\.invalid:1: "):
        bind("nowhere.invalid", 1)


def test_an_ipv6_address_can_be_bound() -> None:
    with bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


async def test_a_stop_lets_running_requests_finish() -> None:
    neuron = Running(FakeNode("m"))
    may_finish = asyncio.Event()
    neuron.node.script = [may_finish, *says("Paris.")]

    async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as session:
        tasks.create_task(neuron.run())
        async with session.post(f"{neuron.url}/v1/chat/completions", json=CHAT) as running:
            neuron.stop.ask()
            await draining(session, neuron.url)
            may_finish.set()
            assert (await running.text()).endswith("data: [DONE]\n\n")

    assert neuron.node.acts == [("drain", 0)]


async def draining(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until ``/health`` says that the neuron drains."""
    async with asyncio.timeout(5):
        while True:
            async with session.get(f"{url}/health") as response:
                if (await response.json())["draining"]:
                    return


@pytest.mark.parametrize("hurried", [True, False])
async def test_what_does_not_finish_in_time_is_cut_off(hurried: bool) -> None:
    neuron = Running(FakeNode("m"))
    never = asyncio.Event()
    neuron.node.script = [never]

    with capture_logs() as lines:
        async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as session:
            tasks.create_task(neuron.run(drain_seconds=60.0 if hurried else 0.01))
            async with session.post(f"{neuron.url}/v1/chat/completions", json=CHAT):
                neuron.stop.ask()
                if hurried:
                    await draining(session, neuron.url)
                    neuron.stop.ask()
                await until(lambda: bool(neuron.node.acts))
                never.set()

    assert "requests cut off by the stop" in [line["event"] for line in lines]


SET_FOR_GPUS = EngineConfig(attention="torch", cuda_graphs=False, batch_invariant=True)


@pytest.mark.parametrize(
    ("engine", "device", "options"),
    [
        (SET_FOR_GPUS, "cpu:0", [["attention", "batch_invariant", "cuda_graphs"]]),
        (EngineConfig(speculation=False), "cpu:0", []),
        (SET_FOR_GPUS, "cuda:0", []),
    ],
)
def test_options_of_a_gpu_where_there_is_none_are_one_line_at_the_start(
    engine: EngineConfig, device: str, options: list[list[str]]
) -> None:
    with capture_logs() as lines:
        say_what_has_no_effect(engine, [DeviceSpec(0, device, 2**30)])

    assert [line["options"] for line in lines] == options


async def test_two_signals_before_the_drain_hurry_it_as_well() -> None:
    stop = Stop()
    stop.ask()
    stop.ask()

    assert not await stop.patiently(asyncio.Event().wait(), seconds=60)  # type: ignore[arg-type]  # bool for None


async def test_a_client_that_leaves_without_a_stream_ends_its_generation_too() -> None:
    neuron = Running(FakeNode("m"))
    neuron.node.script = [asyncio.Event()]

    async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as session:
        tasks.create_task(neuron.run())
        body = CHAT | {"stream": False}
        asking = tasks.create_task(posted(session, f"{neuron.url}/v1/chat/completions", body))
        await neuron.node.started.wait()
        asking.cancel()
        await asyncio.wait_for(neuron.node.generations[0].cancelled.wait(), 5)
        neuron.stop.ask()


async def posted(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> None:
    """Post and read to the end."""
    async with session.post(url, json=body) as response:
        await response.read()


async def test_without_requests_a_stop_is_immediate() -> None:
    neuron = Running(FakeNode())

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(neuron.run())
        neuron.stop.ask()

    assert neuron.node.acts == [("drain", 0)]


async def test_work_beside_the_requests_ends_with_the_neuron() -> None:
    neuron = Running(FakeNode())
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(run(neuron.services, neuron.listener, neuron.stop, 1.0, [work()]))
        await started.wait()
        neuron.stop.ask()


def test_the_tap_is_bound_where_it_was_set(tmp_path: Path) -> None:
    config = NeuronConfig(taps=TapsConfig(directory=str(tmp_path / "t")))

    tap = _tap(config, 1)

    assert socket_path(tmp_path / "t", "supervisor").exists()
    tap.close()


def test_a_tap_that_cannot_be_bound_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = NeuronConfig(taps=TapsConfig(directory=str(tmp_path / "file" / "t")))

    with capture_logs() as lines:
        tap = _tap(config, 1)

    assert tap.directory is None
    assert lines[0]["event"] == "debug tap not bound"


def test_without_taps_nothing_is_bound() -> None:
    assert _tap(NeuronConfig(taps=TapsConfig(enabled=False)), 1).directory is None
