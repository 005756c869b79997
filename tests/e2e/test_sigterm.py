"""SIGTERM to a real neuron, in every state that a device or a model can be caught in.

Faults that tests may order hold it there (``cortex.ipc.injection``). It always ends with status 0,
soon after its drain, and takes its processes along.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stack import MODEL, descendants, free_port, is_alive, until

DRAIN_SECONDS = 0.5
ENDS_SECONDS = 20.0


class Neuron:
    """``neuron serve`` with one CPU device, in which *faults* happen."""

    def __init__(self, faults: str, log: Path) -> None:
        self._port = free_port()
        self.log = log
        self._asked: list[http.client.HTTPConnection] = []
        environment = os.environ | {
            "NEURON_TEST_FAULTS": faults,
            "NEURON_DEVICES": "cpu:0",
            "NEURON_MODELS": MODEL,
            "NEURON_TAPS__ENABLED": "false",
            "NEURON_DRAIN_SECONDS": str(DRAIN_SECONDS),
            "NEURON_ENGINE__STEP_DEADLINE_SECONDS": "3",
        }
        command = [sys.executable, "-m", "cortex.runtime", "serve"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--listen", f"127.0.0.1:{self._port}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer's JSON, None where there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(
                "GET" if body is None else "POST",
                path,
                None if body is None else json.dumps(body),
                {"content-type": "application/json"},
            )
            return json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def phase(self) -> str | None:
        """Return the state of its model, or how far its load is."""
        models = self.ask("/models") or [{"status": None}]
        progress: dict[str, Any] = models[0].get("progress") or {}
        phase: str | None = progress.get("phase") or models[0]["status"]
        return phase

    def device(self) -> str | None:
        """Return the state of its device."""
        health = self.ask("/health")
        return None if health is None else str(health["devices"][0]["state"])

    def generates(self) -> None:
        """Ask for an answer and do not wait for it."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 100, "ignore_eos": True}
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        self._asked.append(connection)

    def close(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.wait()
        for connection in self._asked:
            connection.close()

    def in_flight(self) -> int:
        """Return how many requests it answers."""
        models = (self.ask("/health") or {"models": []})["models"]
        return sum(model["in_flight"] for model in models)


Start = Callable[[str], Neuron]


@pytest.fixture
def start(tmp_path: Path, embedded_model: Path) -> Iterator[Start]:
    neurons: list[Neuron] = []

    def start(faults: str) -> Neuron:
        neurons.append(Neuron(faults, tmp_path / "log"))
        return neurons[-1]

    yield start
    for neuron in neurons:
        neuron.close()


def ends(neuron: Neuron) -> bool:
    """Send SIGTERM; return whether it ends well and nothing of it is left."""
    pids = [neuron.process.pid, *descendants(neuron.process.pid)]
    neuron.process.send_signal(signal.SIGTERM)
    assert neuron.process.wait(ENDS_SECONDS) == 0, neuron.log.read_text()[-4000:]
    until(lambda: not any(map(is_alive, pids)), "its processes to end", 5.0)
    return True


@pytest.mark.parametrize(
    ("faults", "phase"),
    [
        ("download:hang", "downloading"),
        ("load:hang", "loading"),
        ("download:broken", "failed"),
        ("sample:oom@1000000", "loaded"),
    ],
)
def test_it_ends_whatever_its_model_is_doing(start: Start, faults: str, phase: str) -> None:
    neuron = start(faults)
    until(lambda: neuron.phase() == phase, phase)

    assert ends(neuron)


def test_it_ends_before_its_device_is_there(start: Start) -> None:
    neuron = start("load:hang")
    until(lambda: neuron.device() is not None, "the first answer")

    assert ends(neuron)


def test_it_ends_while_a_step_hangs_under_a_request(start: Start) -> None:
    neuron = start("forward:hang@3")
    until(lambda: neuron.phase() == "loaded", "the model")
    neuron.generates()
    until(lambda: neuron.in_flight() == 1, "the request")

    assert ends(neuron)


def test_it_ends_while_a_lost_model_comes_back(start: Start) -> None:
    neuron = start("forward:abort@3")
    until(lambda: neuron.phase() == "loaded", "the model")
    neuron.generates()
    until(lambda: neuron.phase() == "recovering", "the loss")

    assert ends(neuron)


def test_it_ends_with_a_device_that_was_given_up(start: Start) -> None:
    neuron = start("load:abortx4")
    for _ in range(4):
        until(lambda: neuron.phase() == "failed", "the failure")
        if neuron.device() != "poisoned":
            neuron.ask("/models/load", {"model_id": MODEL, "wait": True})
    until(lambda: neuron.device() == "poisoned", "the device to be given up")

    assert ends(neuron)
