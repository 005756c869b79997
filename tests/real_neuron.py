"""A real neuron with a tiny model: its processes, and whether anything of a request is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import urllib3

from stack import descendants, free_port, is_alive, until
from tiny_checkpoint import CONTEXT_TOKENS, write_checkpoint

CONFIGURATION = """
listen = "127.0.0.1:{port}"
models = [{{model_id = "{model}", max_sequences = 1}}]
[[devices]]
name = "cpu:0"
memory_mb = 512
threads = 1
[cache]
directory = "{directory}/cache"
[taps]
enabled = false
[sources.huggingface]
offline = true
[sources.pypi]
index_url = "http://127.0.0.1:9/simple"
"""


class RealNeuron:
    """A context manager: ``neuron serve`` with one model, and all that it keeps in *directory*."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = f"file:{write_checkpoint(directory / 'tiny')}"
        self._log = directory / "log"
        self._file = directory / "neuron.toml"
        self._file.write_text(
            CONFIGURATION.format(port=self.port, model=self.model, directory=directory),
            encoding="utf-8",
        )
        self._http = urllib3.PoolManager(retries=False, timeout=60.0)
        self._pids: list[int] = []
        self._said: Any = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "cortex.runtime", "serve", "--config", str(self._file)]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            until(self._is_serving, "the neuron's model", 60)
            self._pids = [self.process.pid, *descendants(self.process.pid)]
            self._said = self._say()
        except BaseException:
            self.process.kill()
            self.process.wait()
            print(self._log.read_text(encoding="utf-8")[-4000:])
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(30) == 0, self.log()
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def log(self) -> str:
        """Return what the neuron said."""
        return self._log.read_text(encoding="utf-8")

    def get(self, path: str) -> Any:
        """Return the JSON of a GET."""
        return msgspec.json.decode(self._http.request("GET", self.url + path).data)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Return status and JSON of a POST."""
        answer = self._http.request("POST", self.url + path, body=msgspec.json.encode(body))
        return answer.status, msgspec.json.decode(answer.data)

    def check_at_rest(self) -> None:
        """Fail unless every process lives, no request is held, and the whole context is free."""
        assert [pid for pid in self._pids if not is_alive(pid)] == []
        until(self._is_idle, "the neuron to be idle", 30)
        [device] = self.get("/health")["devices"]
        assert (device["state"], device["restarts"]) == ("ready", 0)
        assert self._say() == self._said
        assert "Traceback" not in self.log()

    def _say(self) -> Any:
        """Return what the model says to a prompt that needs its whole memory."""
        prompt = [7] * (CONTEXT_TOKENS - 4)
        asked = {"model": self.model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        status, answer = self.post("/v1/completions", {**asked, "ignore_eos": True})
        assert status == 200, answer
        return answer["choices"]

    def _is_idle(self) -> bool:
        [load] = self.get("/health")["models"]
        return (load["in_flight"], load["queue_depth"], load["kv_available_mb"]) == (
            *(0, 0),
            load["kv_budget_mb"],
        )

    def _is_serving(self) -> bool:
        assert self.process.poll() is None, "the neuron ended"
        try:
            return [model["status"] for model in self.get("/models")] == ["loaded"]
        except urllib3.exceptions.HTTPError:
            return False
