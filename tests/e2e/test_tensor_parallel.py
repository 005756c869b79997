"""A tiny model shared by device processes: the same answers, and what a lost rank does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import urllib3

from cortex.gateway.catalogue import load_catalogue
from cortex.gateway.config import GatewayConfig, Listening
from cortex.gateway.config import Neuron as Node
from gateway_thread import GatewayThread
from stack import descendants, free_port, is_alive, title, until
from tiny_checkpoint import write_checkpoint

CONFIGURATION = """
listen = "127.0.0.1:{port}"
devices = [{devices}]
[engine]
step_deadline_seconds = 3.0
[cache]
directory = "{directory}/cache"
[taps]
enabled = false
[sources.huggingface]
offline = true
"""
RANKS = 2
SAYS = {"prompt": "one two three", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
LONG = SAYS | {"max_tokens": 240, "stream": True}


class SharedNeuron:
    """``neuron serve`` with as many CPU devices as a model is to be shared by."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = f"file:{write_checkpoint(directory / 'tiny')}"
        self.log = directory / "log"
        self._file = directory / "neuron.toml"
        devices = [f'{{name = "cpu:{n}", memory_mb = 256, threads = 1}}' for n in range(RANKS)]
        self._file.write_text(
            CONFIGURATION.format(port=self.port, devices=", ".join(devices), directory=directory),
            encoding="utf-8",
        )
        self._http = urllib3.PoolManager(retries=False, timeout=60.0)

    def start(self) -> None:
        command = [sys.executable, "-m", "cortex.runtime", "serve", "--config", str(self._file)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def get(self, path: str) -> Any:
        return msgspec.json.decode(self._http.request("GET", self.url + path).data)

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        data = msgspec.json.encode(body)
        answer = self._http.request("POST", self.url + path, body=data)
        return answer.status, msgspec.json.decode(answer.data)

    def loads(self, **how: Any) -> None:
        status, answer = self.post("/models/load", model_id=self.model, wait=True, **how)
        assert status == 200, (answer, self.log.read_text(encoding="utf-8")[-3000:])

    def unloads(self) -> None:
        status, answer = self.post("/models/unload", model_id=self.model, force=True)
        assert status == 200, answer

    def says(self) -> str:
        status, answer = self.post("/v1/completions", model=self.model, **SAYS)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def streams(self, on_line: Callable[[], None]) -> list[str]:
        """Return the lines of a long answer; *on_line* is called at the first that has text."""
        body = msgspec.json.encode(LONG | {"model": self.model})
        answer = self._http.request(
            "POST", f"{self.url}/v1/completions", body=body, preload_content=False
        )
        lines: list[str] = []
        rest = b""
        while piece := answer.read1():
            *whole, rest = (rest + piece).split(b"\n")
            is_first = not lines
            lines += [line.decode() for line in whole if line.startswith(b"data")]
            if lines and is_first:
                on_line()
        answer.close()
        return lines

    def status(self) -> str | None:
        return next((m["status"] for m in self.get("/models") if m["id"] == self.model), None)

    def pid_of(self, device: str) -> int:
        (pid,) = (p for p in descendants(self.process.pid) if title(p) == f"neuron {device}")
        return pid

    def losses(self) -> list[dict[str, int]]:
        return [device["restarts_by_cause"] for device in self.get("/health")["devices"]]

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        try:
            devices = self.get("/health")["devices"]
        except urllib3.exceptions.HTTPError:
            return False
        return all(device["state"] == "ready" for device in devices)

    def until_ready(self) -> None:
        until(self._is_ready, "the devices", 60)


@pytest.fixture(scope="module")
def neuron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNeuron]:
    neuron = SharedNeuron(tmp_path_factory.mktemp("shared"))
    neuron.start()
    try:
        neuron.until_ready()
        yield neuron
    finally:
        if neuron.process.poll() is None and neuron.stop() != 0:
            print(neuron.log.read_text(encoding="utf-8")[-4000:])


@pytest.fixture(scope="module")
def said_alone(neuron: SharedNeuron) -> str:
    """What the model says on one device."""
    neuron.loads()
    said = neuron.says()
    neuron.unloads()
    return said


@pytest.fixture
def shared(neuron: SharedNeuron, said_alone: str) -> SharedNeuron:
    """The neuron with its model on all devices."""
    neuron.until_ready()
    if neuron.status() is None:
        neuron.loads(tensor_parallel=RANKS)
    return neuron


def test_two_ranks_say_what_one_device_says(shared: SharedNeuron, said_alone: str) -> None:
    assert len(said_alone) > 10

    assert shared.says() == said_alone

    (model,) = shared.get("/models")
    assert [device["index"] for device in model["devices"]] == [0, 1]
    assert all(device["kv_mb"] for device in model["devices"])


def test_a_killed_rank_ends_the_streams_and_the_group_comes_back(
    shared: SharedNeuron, said_alone: str
) -> None:
    before = [shared.pid_of(f"cpu:{n}") for n in range(RANKS)]

    lines = shared.streams(lambda: os.kill(before[1], signal.SIGKILL))

    assert "error" in lines[-1], lines[-3:]
    until(lambda: shared.status() == "loaded", "the model to come back", 60)
    assert shared.says() == said_alone
    assert not any(is_alive(pid) for pid in before)
    assert shared.losses() == [{"peer": 1}, {"died": 1}]


def test_a_stopped_rank_is_noticed_by_the_deadline(shared: SharedNeuron, said_alone: str) -> None:
    before = [shared.pid_of(f"cpu:{n}") for n in range(RANKS)]

    lines = shared.streams(lambda: os.kill(before[1], signal.SIGSTOP))

    assert "error" in lines[-1], lines[-3:]
    until(lambda: shared.status() == "loaded", "the model to come back", 60)
    assert shared.says() == said_alone
    assert not any(is_alive(pid) for pid in before)


def test_unloading_gives_the_memory_of_every_rank_back(shared: SharedNeuron) -> None:
    held = [device["loadable_mb"] for device in shared.get("/health")["devices"]]

    shared.unloads()

    free = [device["loadable_mb"] for device in shared.get("/health")["devices"]]
    assert shared.get("/models") == []
    assert all(after > before for after, before in zip(free, held, strict=True))
    assert all(is_alive(shared.pid_of(f"cpu:{n}")) for n in range(RANKS))


def test_what_ranks_cannot_share_is_refused_in_words(neuron: SharedNeuron) -> None:
    status, answer = neuron.post("/models/load", model_id=neuron.model, tensor_parallel=RANKS + 1)

    assert (status, answer["error"]["kind"]) == (422, "too_few_devices")


def test_a_gateway_loads_a_shared_model_as_its_profile_says(
    neuron: SharedNeuron, said_alone: str, tmp_path: Path
) -> None:
    models = tmp_path / "models.toml"
    models.write_text(f'[[models]]\nid = "pair"\nsource = "{neuron.model}"\ntensor_parallel = 2\n')
    config = GatewayConfig(
        gateway=Listening("127.0.0.1:0", "127.0.0.1:0"), neurons=(Node("a", neuron.url),)
    )
    neuron.until_ready()

    with GatewayThread(config, load_catalogue(models, ["a"])) as gateway:
        answer = urllib3.request(
            "POST", f"{gateway.url}/v1/completions", json=SAYS | {"model": "pair"}
        ).json()

    assert answer["choices"][0]["text"] == said_alone
    (model,) = neuron.get("/models")
    assert [device["index"] for device in model["devices"]] == [0, 1]


def test_a_stop_ends_every_rank_in_order(shared: SharedNeuron) -> None:
    pids = [shared.pid_of(f"cpu:{n}") for n in range(RANKS)]
    assert shared.says()

    status = shared.stop()

    assert status == 0
    assert not any(is_alive(pid) for pid in pids)
