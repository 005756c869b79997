"""The arithmetic of scripts/bench-health and scripts/fault-table, and what /proc tells them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bench_health
import fault_table
import processes
import pytest
from answers import Address, Trouble
from bench_health import ask, figures
from fault_table import FAULTS, Cost, is_as_promised, row

from cortex.ipc import injection
from scripted_server import Reply, ScriptedServer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize(
    "name", ["soak", "bench-gateway", "bench-health", "fault-table", "bench-serve"]
)
def test_the_help_teaches(name: str) -> None:
    environment = os.environ | {"CORTEX_VENV": str(Path(sys.executable).parents[1])}
    command = [str(SCRIPTS / name), "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0
    assert "Exit status" in ended.stdout


def test_every_answer_is_timed_by_its_path() -> None:
    ok: list[Reply] = [(200, {})]
    with ScriptedServer({"GET /health": ok, "GET /models": ok}) as server:
        taken, late = ask(Address("127.0.0.1", server.port), 0.2, 100.0)

    assert {path: len(values) for path, values in taken.items()} == {"/health": 10, "/models": 10}
    assert len(late) <= 20


def test_an_answer_that_is_refused_is_trouble() -> None:
    with (
        ScriptedServer({"GET /health": [(503, {})]}) as server,
        pytest.raises(Trouble, match="/health answered 503"),
    ):
        ask(Address("127.0.0.1", server.port), 0.2, 100.0)


def test_figures_are_of_all_values() -> None:
    assert figures([float(n) for n in range(101)]) == {
        "count": 101,
        "p50": 50.0,
        "p99": 99.0,
        "max": 100.0,
    }
    assert figures([])["count"] == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_kills_a_process_or_orders_what_the_neuron_knows(name: str) -> None:
    fault = FAULTS[name]

    assert (fault.kills is None) != (fault.orders is None)
    assert fault.orders is None or injection.parse(fault.orders)


def test_a_row_shows_what_a_fault_cost() -> None:
    cost = Cost(0.03, 0.5, 0, 0)

    assert row(FAULTS["device"], cost) == (
        "| a device process is killed | 0.03 s | 0.50 s | 0 | 0 bytes |"
    )
    assert "| never |" in row(FAULTS["device"], None)
    assert "its own too" in row(FAULTS["fork-server"], Cost(0.1, 1.0, None, 0))


@pytest.mark.parametrize(
    ("cost", "is_it"),
    [
        (Cost(1, 2, 0, 0), True),
        (Cost(1, 2, None, 0), True),
        (Cost(1, 2, 1, 0), False),
        (Cost(1, 2, 0, 4096), False),
    ],
)
def test_what_is_lost_elsewhere_or_left_behind_breaks_the_promise(cost: Cost, is_it: bool) -> None:
    assert is_as_promised(cost) is is_it


def test_an_unknown_fault_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fault-table", "earthquake"])

    with pytest.raises(SystemExit):
        fault_table.main()

    assert "no such fault: earthquake" in capsys.readouterr().err


def test_the_target_is_twenty_milliseconds() -> None:
    assert "default 20" in (bench_health.__doc__ or "") + Path(bench_health.__file__).read_text()


def test_a_process_holds_memory_and_descriptors() -> None:
    held = processes.Holdings.of(os.getpid())

    assert held.anonymous_bytes > 2**20
    assert held.descriptors >= 3
    assert held.threads >= 1


def test_a_zombie_is_told_from_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    assert processes.is_zombie(child.pid)
    assert not processes.is_alive(child.pid)
    assert child.pid in processes.family(os.getpid())

    child.wait()
    assert not processes.is_zombie(child.pid)
    assert processes.name_of(child.pid) == ""
