"""LiteLLM's proxy that a script starts for itself, in the environment it is installed in."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from answers import Address, Trouble
from local_neuron import stop, until
from quickstart import LOGS, die_with_parent, fetched, free_addresses

QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches one from the internet
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_TELEMETRY": "False",
}


def settings(model: str, nodes: Sequence[Address], key: str) -> dict[str, Any]:
    """Return its configuration: no database, no callbacks, no second attempts."""
    return {
        "model_list": [
            {
                "model_name": model,
                "litellm_params": {
                    "model": f"openai/{model}",
                    "api_base": f"http://{node}/v1",
                    "api_key": "none",
                },
            }
            for node in nodes
        ],
        "router_settings": {"routing_strategy": "simple-shuffle", "num_retries": 0},
        "litellm_settings": {
            "telemetry": False,
            "set_verbose": False,
            "num_retries": 0,
            "request_timeout": 600,
        },
        "general_settings": {"master_key": key},
    }


class LiteLlm:
    """*program*, one process of it, in front of *nodes*; a context manager.

    The log is ``.cache/bench-gateway-litellm.log``.
    """

    def __init__(self, program: Path, model: str, nodes: Sequence[Address], key: str) -> None:
        self.place = free_addresses({"its port": Address("127.0.0.1", 0)})["its port"]
        LOGS.mkdir(exist_ok=True)
        self.log = LOGS / "bench-gateway-litellm.log"
        self._folder = tempfile.TemporaryDirectory(prefix="cortex-")
        written = Path(self._folder.name, "config.yaml")
        written.write_text(json.dumps(settings(model, nodes, key)), encoding="utf-8")
        command: list[str | Path] = [program, "--config", written, "--host", self.place.host]
        command += ["--port", str(self.place.port), "--num_workers", "1", "--telemetry", "False"]
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    command,
                    cwd=self._folder.name,
                    env=os.environ | QUIET,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),  # noqa: PLW1509 (before this process has threads)
                )
            except OSError as exc:
                self._folder.cleanup()
                raise Trouble(f"{program} cannot be run: {exc.strerror}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.process)
        self._folder.cleanup()

    def wait_until_serving(self) -> None:
        """Wait until it says that it lives; raise Trouble."""
        until(self._serves, f"LiteLLM to serve; log: {self.log}")

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise Trouble(f"LiteLLM ended with {self.process.returncode}; log: {self.log}")
        return fetched(self.place, "/health/liveliness") is not None
