"""A gateway that a script starts for itself, on free ports of this machine, and stops again."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from answers import Address, Trouble
from local_neuron import stop, until
from quickstart import LOGS, die_with_parent, fetched, free_addresses


class LocalGateway:
    """``cortex serve`` in front of *neurons*, with *aliases*; a context manager.

    It keeps its state in a directory of its own; the log is ``.cache/NAME-PORT.log``. *tables* are
    lines of its configuration beside those.
    """

    def __init__(
        self,
        name: str,
        neurons: Mapping[str, Address],
        aliases: Mapping[str, str],
        tables: Iterable[str] = (),
    ) -> None:
        anywhere = Address("127.0.0.1", 0)
        places = free_addresses({"listen": anywhere, "metrics_listen": anywhere})
        self.place = places["listen"]
        LOGS.mkdir(exist_ok=True)
        self.log = LOGS / f"{name}-{self.place.port}.log"
        self._folder = tempfile.TemporaryDirectory(prefix="cortex-")
        folder = Path(self._folder.name)
        lines = ["[gateway]", *(f'{option} = "{place}"' for option, place in places.items())]
        for neuron, place in neurons.items():
            lines += ["[[neurons]]", f'name = "{neuron}"', f'endpoint = "http://{place}"']
        lines += ["[state]", f'directory = "{folder}"', *tables, ""]
        (folder / "cortex.toml").write_text("\n".join(lines), encoding="utf-8")
        names = [f'"{alias}" = "{target}"' for alias, target in aliases.items()]
        (folder / "models.toml").write_text("\n".join(["[aliases]", *names, ""]), encoding="utf-8")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "cortex.gateway",
                    "serve",
                    "--config",
                    folder / "cortex.toml",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 (before this process has threads)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.process)
        self._folder.cleanup()

    def wait_until_serving(self, model: str) -> None:
        """Wait until *model* is shown as loaded; raise Trouble."""
        until(lambda: self._serves(model), f"the gateway to serve {model}; log: {self.log}")

    def _serves(self, model: str) -> bool:
        if self.process.poll() is not None:
            raise Trouble(f"the gateway ended with {self.process.returncode}; log: {self.log}")
        listed = fetched(self.place, "/v1/models") or {"data": []}
        return any(entry["id"] == model and entry.get("loaded") for entry in listed["data"])
