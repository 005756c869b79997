"""A real stack for end-to-end tests: ``cortex up`` as a user starts it, and a look at its work.

Nothing here knows the product's insides: processes are found as children of children in /proc, by
their titles.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Self

import msgspec
import urllib3

MODEL = "smollm2-135m-instruct"
DEADLINE_SECONDS = 90.0


GIVEN: set[int] = set()
"""Ports that this process has given out: the kernel may offer one again before it is used."""


def free_port() -> int:
    """Return a port that nobody listens on now, another one each time."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    if port in GIVEN:
        return free_port()
    GIVEN.add(port)
    return port


def until(
    condition: Callable[[], Any], what: str, deadline_seconds: float = DEADLINE_SECONDS
) -> Any:
    """Poll *condition* until it is true and return it; fail naming *what* after the deadline."""
    end = time.monotonic() + deadline_seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {deadline_seconds:.0f} s in vain for {what}")


def is_alive(pid: int) -> bool:
    """Whether *pid* runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def title(pid: int) -> str:
    """Return the command line of *pid*; empty once it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def descendants(pid: int) -> list[int]:
    """Return the pids of all children of *pid*, and of theirs, that run."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


class Stack:
    """One gateway and one neuron with a device process per entry of *devices*."""

    def __init__(self, *options: str, devices: str = "cpu:0", log: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.metrics_url = f"http://127.0.0.1:{free_port()}"
        self.neuron_url = f"http://127.0.0.1:{free_port()}"
        self.log = log
        self._options = ["--devices", devices, *options]
        self._http = urllib3.PoolManager(retries=False, timeout=60.0)

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "cortex.gateway", "up", *self._options]
        for option, url in (
            ("--listen", self.url),
            ("--metrics-listen", self.metrics_url),
            ("--neuron-listen", self.neuron_url),
        ):
            command += [option, url.removeprefix("http://")]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *_: object) -> None:
        pids = [self.process.pid, *descendants(self.process.pid)]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in filter(is_alive, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def get(self, path: str, base: str | None = None) -> Any:
        """Return the JSON of a GET, or None where nobody answers with 200."""
        try:
            response = self._http.request("GET", (base or self.url) + path)
        except urllib3.exceptions.HTTPError:
            return None
        return msgspec.json.decode(response.data) if response.status == 200 else None

    def post(
        self, path: str, body: dict[str, Any], base: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of a POST."""
        response = self._http.request(
            "POST",
            (base or self.url) + path,
            body=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
        )
        return response.status, msgspec.json.decode(response.data)

    def stream(
        self, path: str, body: dict[str, Any], base: str | None = None
    ) -> Generator[str, None, None]:
        """Yield the non-empty lines of an event stream as they arrive."""
        response = self._http.request(
            "POST",
            (base or self.url) + path,
            body=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
            preload_content=False,
        )
        rest = b""
        try:
            while piece := response.read1():
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line.decode() for line in lines if line)
        finally:
            response.close()

    def is_serving(self) -> bool:
        """Whether ``/v1/models`` says that the embedded model is loaded."""
        entries = (self.get("/v1/models") or {"data": []})["data"]
        return any(entry["id"] == MODEL and entry.get("loaded") for entry in entries)

    def wait_serving(self) -> None:
        """Wait until the embedded model serves; fail with the log otherwise."""
        try:
            until(lambda: self.is_serving() or self.process.poll() is not None, "the model")
            assert self.is_serving(), "the stack ended"
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log.read_text()[-4000:]}") from exc

    def pids_of(self, what: str) -> list[int]:
        """Return the pids of all processes with *what* in their title."""
        return [pid for pid in descendants(self.process.pid) if what in title(pid)]

    def pid_of(self, what: str) -> int:
        """Return the pid of ``neuron cpu:0``, the fork server or the supervisor, by its title."""
        found = self.pids_of(what)
        assert len(found) == 1, f"{what}: {[title(p) for p in descendants(self.process.pid)]}"
        return found[0]
