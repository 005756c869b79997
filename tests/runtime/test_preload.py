"""The real fork server, with torch, and a real device process; started once, killed once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "supervisor_program.py"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, str(PROGRAM)], check=True, stdout=subprocess.PIPE, timeout=120
    )
    facts: dict[str, Any] = json.loads(ran.stdout)
    return facts


def test_the_fork_server_has_everything_imported(report: dict[str, Any]) -> None:
    assert report["preloaded"]
    assert report["torch_version"]


def test_the_fork_server_has_one_thread(report: dict[str, Any]) -> None:
    assert report["server_threads"] == 1


def test_the_device_process_is_titled(report: dict[str, Any]) -> None:
    assert report["title"] == "neuron cpu:0"


def test_the_supervisor_has_no_torch(report: dict[str, Any]) -> None:
    assert not report["supervisor_has_torch"]


def test_a_restart_takes_well_under_a_second(report: dict[str, Any]) -> None:
    assert report["restart_seconds"] < 1.0
