"""``cortex up``: two daemons that live and die together."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cortex.gateway import up as module
from cortex.gateway.app import CannotListen
from cortex.gateway.catalogue import BUILT_IN
from cortex.gateway.config import State
from cortex.gateway.serving import INTERRUPTED, StopSignals, serve
from cortex.gateway.up import NeuronProcess, Plan, up
from cortex.gateway.written import Written
from cortex.ipc.settings import ConfigError
from fakes import FakeNeuron, gateway_config, until

FAKE = Path(__file__).resolve().parents[1] / "fake_neuron.py"
ANY = "127.0.0.1:0"


class Terminal:
    """What was said, and a plan for a fake neuron of a certain manner."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self._monkeypatch = monkeypatch

    def say(self, text: str) -> None:
        self.said.append(text)

    def plan(self, manner: str = "well", model: str = "smollm2-135m-instruct") -> Plan:
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, str(FAKE), address.rpartition(":")[2], manner]
        self._monkeypatch.setattr(Plan, "command", lambda _: command)
        return Plan(ANY, ANY, address, model)

    def is_ready(self) -> bool:
        return any("cortex is ready" in text for text in self.said)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of neurons that were started."""
    started: list[int] = []
    original = NeuronProcess.__aenter__

    async def noting(process: NeuronProcess) -> NeuronProcess:
        await original(process)
        started.append(process.pid)
        return process

    monkeypatch.setattr(NeuronProcess, "__aenter__", noting)
    return started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_alive(pid: int) -> bool:
    """Whether *pid* runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def when(condition: Callable[[], bool], *signals: signal.Signals) -> None:
    """Send *signals* to this process as soon as *condition* holds."""
    await until(condition, within_seconds=20)
    for number in signals:
        os.kill(os.getpid(), number)
        await asyncio.sleep(0)


async def run(plan: Plan, terminal: Terminal, *signals: signal.Signals) -> int:
    """Return the exit status of ``cortex up`` that gets *signals* once it is ready."""
    async with asyncio.TaskGroup() as group:
        status = group.create_task(up(plan, terminal.say))
        if signals:
            group.create_task(when(terminal.is_ready, *signals))
    return status.result()


async def test_it_says_where_clients_find_it_and_stops_both(
    terminal: Terminal, children: list[int]
) -> None:
    status = await run(terminal.plan(), terminal, signal.SIGTERM)

    assert status == 0
    assert "smollm2-135m-instruct" in terminal.said[-1]
    assert "OpenAI       http://127.0.0.1:" in terminal.said[-1]
    assert [is_alive(pid) for pid in children] == [False]


async def test_another_model_is_loaded_and_listed(terminal: Terminal) -> None:
    status = await run(terminal.plan(model="file:/x.gguf"), terminal, signal.SIGINT)

    assert (status, "file:/x.gguf" in terminal.said[-1]) == (0, True)


async def test_a_second_signal_cuts_it_short(terminal: Terminal, children: list[int]) -> None:
    plan = terminal.plan("stubborn")

    status = await run(plan, terminal, signal.SIGINT, signal.SIGINT)

    assert (status, [is_alive(pid) for pid in children]) == (INTERRUPTED, [False])


async def test_a_neuron_that_does_not_stop_is_killed(
    terminal: Terminal, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.1)

    status = await run(terminal.plan("stubborn"), terminal, signal.SIGTERM)

    assert (status, [is_alive(pid) for pid in children]) == (0, [False])


async def test_when_the_neuron_ends_so_does_the_gateway(terminal: Terminal) -> None:
    status = await run(terminal.plan("ends"), terminal)

    assert status == 1
    assert "the neuron has ended with exit status 3" in terminal.said[-1]


async def test_a_neuron_that_is_killed_is_named_by_its_signal(
    terminal: Terminal, children: list[int]
) -> None:
    async with asyncio.TaskGroup() as group:
        status = group.create_task(up(terminal.plan(), terminal.say))
        await until(terminal.is_ready, within_seconds=20)
        os.kill(children[0], signal.SIGKILL)

    assert status.result() == 1
    assert "the neuron has ended with signal 9" in terminal.said[-1]


async def test_a_model_that_cannot_be_loaded_stops_it_with_the_reason(terminal: Terminal) -> None:
    status = await run(terminal.plan("cannot-load"), terminal)

    assert status == 1
    assert terminal.said[-1].endswith("could not be loaded on local: the disk is full")


async def test_a_port_of_the_neuron_that_is_taken_is_one_sentence(terminal: Terminal) -> None:
    plan = terminal.plan()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(plan.neuron_listen.rpartition(":")[2])))
        taken.listen()

        with pytest.raises(CannotListen, match=r"cannot listen on 127\.0\.0\.1:\d+: address"):
            await up(plan, terminal.say)


async def test_the_neuron_needs_a_port_of_its_own(terminal: Terminal) -> None:
    with pytest.raises(ConfigError, match=r"--neuron-listen .* a port that the gateway knows"):
        await up(Plan(ANY, ANY, ANY, "m"), terminal.say)


def test_the_neuron_dies_with_a_parent_that_is_killed() -> None:
    code = (
        "import asyncio\n"
        "from cortex.gateway.up import NeuronProcess\n"
        "async def main():\n"
        "    async with NeuronProcess(['sleep', '60']) as process:\n"
        "        print(process.pid, flush=True)\n"
        "        await process.ended()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        parent.wait()

        asyncio.run(until(lambda: not is_alive(pid)))


def test_the_command_line_is_the_neurons() -> None:
    plan = Plan(ANY, ANY, "127.0.0.1:9", "m", "cpu:0,cpu:1")

    command = plan.command()

    assert command[1:] == [
        *("-m", "cortex.runtime", "serve"),
        *("--listen", "127.0.0.1:9", "--devices", "cpu:0,cpu:1"),
    ]


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:9", "http://127.0.0.1:9"),
        ("0.0.0.0:9", "http://127.0.0.1:9"),
        ("[::]:9", "http://[::1]:9"),
    ],
)
def test_the_gateway_finds_the_neuron(listen: str, url: str) -> None:
    assert Plan(ANY, ANY, listen, "m").config().neurons[0].url == url


def test_it_does_not_import_the_runtime() -> None:
    code = "import sys, cortex.gateway.cli; sys.exit('cortex.runtime' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def written_for(neuron: FakeNeuron, folder: Path) -> Callable[[], Written]:
    """Return what reads a configuration for *neuron* that keeps its state in *folder*."""
    config = gateway_config(neuron, state=State(str(folder)))
    return lambda: Written(config, BUILT_IN)


async def test_serve_ends_with_a_signal(neuron: FakeNeuron, tmp_path: Path) -> None:
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        serving = serve(written_for(neuron, tmp_path), lambda _: ready.set())
        status = group.create_task(serving)
        group.create_task(when(ready.is_set, signal.SIGTERM))

    assert status.result() == 0


async def test_a_daemon_keeps_its_state_where_it_is_told(
    neuron: FakeNeuron, tmp_path: Path
) -> None:
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        serving = serve(written_for(neuron, tmp_path), lambda _: ready.set())
        group.create_task(serving)
        group.create_task(when(ready.is_set, signal.SIGTERM))

    assert (tmp_path / "cortex.db").exists()


async def test_a_daemon_reads_its_files_again_at_sighup_and_serves_on(
    neuron: FakeNeuron, tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    ready = asyncio.Event()

    def is_said() -> bool:
        return any(entry["event"] == "configuration reloaded" for entry in logged)

    async with asyncio.TaskGroup() as group:
        serving = serve(written_for(neuron, tmp_path), lambda _: ready.set())
        status = group.create_task(serving)
        group.create_task(when(ready.is_set, signal.SIGHUP))
        group.create_task(when(is_said, signal.SIGTERM))

    assert status.result() == 0


async def test_it_stops_when_its_terminal_is_closed(terminal: Terminal) -> None:
    assert await run(terminal.plan(), terminal, signal.SIGHUP) == 0


async def test_nohup_is_left_as_it_is() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        StopSignals(is_daemon=False)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_daemon_hears_sighup_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals(is_daemon=True)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            await signals.hangup.wait()
    finally:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGHUP, before)

    assert not signals.asked.is_set()


async def test_serve_is_cut_short_by_a_second_signal(neuron: FakeNeuron, tmp_path: Path) -> None:
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        serving = serve(written_for(neuron, tmp_path), lambda _: ready.set())
        status = group.create_task(serving)
        group.create_task(when(ready.is_set, signal.SIGTERM, signal.SIGTERM))

    assert status.result() in (0, INTERRUPTED)
