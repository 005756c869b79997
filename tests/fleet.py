"""A fleet for end-to-end tests: four real neurons that can be cut off, and a real gateway.

    gateway, here ──── veth ──── namespace 0: neuron a        cut off: its end is down
                  ├─── veth ──── namespace 1: neuron b
                  ...

Where network namespaces cannot be made, neurons listen on loopback ports, and one that is cut off
is stopped (SIGSTOP): it answers nobody either. Devices have small budgets, so that eviction is
real; the models are tiny, and their KV caches are what needs memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import urllib3

from stack import descendants, free_port, is_alive, until
from tiny_checkpoint import write_checkpoint

DEVICE_MB = 256
HTTP = urllib3.PoolManager(retries=False, timeout=60.0, maxsize=64)


def can_make_namespaces() -> bool:
    """Whether this is a machine, and we are somebody, for whom ``ip netns`` works."""
    name = f"cortex-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
        if made.returncode:
            return False
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=True)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Namespace:
    """A network namespace with one link to ours."""

    name: str
    host: str
    """Its end of the link."""

    @classmethod
    def make(cls, index: int) -> Namespace:
        """Make it; a private network of two addresses."""
        own = os.getpid() % 200
        name, link = f"cortex-{os.getpid()}-{index}", f"cx{os.getpid() % 100_000}n{index}"
        network = f"10.{own + 20}.{index}"
        for command in (
            f"netns add {name}",
            f"link add {link} type veth peer name eth0 netns {name}",
            f"address add {network}.1/30 dev {link}",
            f"link set {link} up",
            f"-netns {name} address add {network}.2/30 dev eth0",
            f"-netns {name} link set eth0 up",
            f"-netns {name} link set lo up",
        ):
            _ip(command)
        return cls(name, f"{network}.2")

    def set_link(self, state: str) -> None:
        """Set its end of the link ``up`` or ``down``: what goes there finds no other way."""
        _ip(f"-netns {self.name} link set eth0 {state}")

    def delete(self) -> None:
        """Take it away, and the link with it."""
        _ip(f"netns delete {self.name}")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


class FleetNeuron:
    """One ``neuron serve`` with a device of ``DEVICE_MB``."""

    def __init__(self, name: str, folder: Path, namespace: Namespace | None) -> None:
        self.name = name
        self.host = namespace.host if namespace else "127.0.0.1"
        self.port = free_port()
        self.url = f"http://{self.host}:{self.port}"
        self.log = folder / f"{name}.log"
        self._namespace = namespace
        self._config = folder / f"{name}.toml"
        self._config.write_text(
            f"""
listen = "{self.host}:{self.port}"
[[devices]]
name = "cpu:0"
memory_mb = {DEVICE_MB}
threads = 1
[cache]
directory = "{folder}/cache-{name}"
[taps]
enabled = false
[sources.file]
roots = ["{folder}"]
[sources.pypi]
index_url = "http://127.0.0.1:9/simple"
""",
            encoding="utf-8",
        )
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again."""
        command = [sys.executable, "-m", "cortex.runtime", "serve", "--config", str(self._config)]
        if self._namespace:
            command = ["ip", "netns", "exec", self._namespace.name, *command]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def get(self, path: str) -> Any:
        """Return the JSON of a GET, or None where nobody answers."""
        return _got(self.url + path)

    def is_up(self) -> bool:
        """Whether its device is ready."""
        devices = (self.get("/health") or {"devices": []})["devices"]
        return bool(devices) and all(device["state"] == "ready" for device in devices)

    def loaded(self) -> set[str]:
        """Return what it has loaded, by its own names."""
        return {m["id"] for m in self.get("/models") or [] if m["status"] == "loaded"}

    def loads(self) -> list[str]:
        """Return the models of all loads so far, in order, as its log has them."""
        said = self.log.read_bytes().splitlines()
        lines = [msgspec.json.decode(line) for line in said if line.startswith(b"{")]
        return [line["model"] for line in lines if line.get("event") == "model loaded"]

    def cut_off(self) -> None:
        """Let nothing come through to it, or from it."""
        if self._namespace:
            self._namespace.set_link("down")
        else:
            self.process.send_signal(signal.SIGSTOP)

    def heal(self) -> None:
        """Undo it."""
        if self._namespace:
            self._namespace.set_link("up")
        else:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it, whatever state it is in."""
        pids = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in filter(is_alive, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Fleet:
    """Four neurons ``a`` to ``d``, a gateway, and the catalogue; a context manager.

    *models* are profiles by id: lines of TOML. Each is a tiny checkpoint of its own.
    """

    def __init__(self, folder: Path, models: Mapping[str, str]) -> None:
        self._folder = folder
        self._exits = contextlib.ExitStack()
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.neurons: dict[str, FleetNeuron] = {}
        self.models = dict(models)
        self.sources = {
            model: f"file:{write_checkpoint(folder / 'models' / model)}" for model in models
        }

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as exits:
            isolated = can_make_namespaces()
            for index, name in enumerate("abcd"):
                namespace = Namespace.make(index) if isolated else None
                if namespace:
                    exits.callback(namespace.delete)
                self.neurons[name] = FleetNeuron(name, self._folder, namespace)
                exits.callback(self.neurons[name].stop)
            self._write()
            for neuron in self.neurons.values():
                until(neuron.is_up, f"neuron {neuron.name}")
            self.start_gateway()
            exits.callback(self.stop_gateway)
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.__exit__(kind, error, traceback)

    def _write(self) -> None:
        neurons = "".join(
            f'[[neurons]]\nname = "{n.name}"\nendpoint = "{n.url}"\n' for n in self.neurons.values()
        )
        (self._folder / "cortex.toml").write_text(
            f"""
[gateway]
listen = "127.0.0.1:{self.port}"
metrics_listen = "127.0.0.1:{self.metrics_port}"
{neurons}
[eviction]
min_dwell_seconds = 0.5
[state]
directory = "{self._folder}/state"
[timeouts]
connect_seconds = 0.5
control_seconds = 1.0
poll_seconds = 0.2
poll_while_loading_seconds = 0.05
between_bytes_seconds = 5.0
""",
            encoding="utf-8",
        )
        profiles = [
            f'[[models]]\nid = "{model}"\nsource = "{self.sources[model]}"\n{lines}\n'
            for model, lines in self.models.items()
        ]
        text = '[aliases]\n"claude-tiny" = "red"\n' + "".join(profiles)
        (self._folder / "models.toml").write_text(text, encoding="utf-8")

    def start_gateway(self) -> None:
        """Start the gateway, for the first time or again."""
        config = str(self._folder / "cortex.toml")
        with (self._folder / "gateway.log").open("ab") as output:
            self.gateway = subprocess.Popen(
                [sys.executable, "-m", "cortex.gateway", "serve", "--config", config],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        until(self._knows_all, "the gateway to know its nodes")

    def _knows_all(self) -> bool:
        assert self.gateway.poll() is None, (self._folder / "gateway.log").read_text()[-3000:]
        health = self.get("/health")
        return health is not None and health["nodes"]["healthy"] == len(self.neurons)

    def stop_gateway(self) -> None:
        """Stop it in good order."""
        self.gateway.terminate()
        try:
            self.gateway.wait(20)
        except subprocess.TimeoutExpired:
            self.gateway.kill()
            self.gateway.wait()

    def get(self, path: str) -> Any:
        """Return the JSON of a GET, or None where nobody answers with 200."""
        return _got(self.url + path)

    def metrics(self) -> str:
        """Return the exposition."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        return HTTP.request("GET", url).data.decode()

    def post(self, path: str, body: dict[str, Any]) -> urllib3.BaseHTTPResponse:
        """Return the answer of a POST, whatever its status."""
        return HTTP.request("POST", self.url + path, body=msgspec.json.encode(body))

    def chat(self, model: str, tokens: int = 4) -> urllib3.BaseHTTPResponse:
        """Ask *model* for a few words."""
        return self.post("/v1/chat/completions", _chat(model, tokens))

    def stream(self, model: str, tokens: int) -> Iterator[str]:
        """Yield the lines of a stream as they come, to its end however that comes."""
        response = HTTP.request(
            "POST",
            self.url + "/v1/chat/completions",
            body=msgspec.json.encode({**_chat(model, tokens), "stream": True}),
            preload_content=False,
        )
        rest = b""
        try:
            while piece := response.read1():
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line.decode() for line in lines if line)
        finally:
            response.close()

    def listed(self) -> dict[str, set[str]]:
        """Return the nodes at which ``/v1/models`` says that each model is loaded."""
        return {
            entry["id"]: {
                place["node"] for place in entry["locations"] if place["status"] == "loaded"
            }
            for entry in self.get("/v1/models")["data"]
        }

    def truth(self) -> dict[str, set[str]]:
        """Return the same as the neurons themselves say it; of those who answer."""
        held = {name: neuron.loaded() for name, neuron in self.neurons.items()}
        return {
            model: {name for name, loaded in held.items() if source in loaded}
            for model, source in self.sources.items()
        }

    def check_no_lie(self) -> None:
        """Fail unless ``/v1/models`` soon says of every model where it is, and nothing else."""
        until(lambda: self._shown() == self.truth(), "the list of models to be true", 10)

    def _shown(self) -> dict[str, set[str]]:
        return {model: nodes for model, nodes in self.listed().items() if model in self.sources}


def _chat(model: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True}


def _got(url: str) -> Any:
    try:
        response = HTTP.request("GET", url, timeout=2.0)
    except urllib3.exceptions.HTTPError:
        return None
    return msgspec.json.decode(response.data) if response.status == 200 else None
