"""From a bare clone to answers: install, start both daemons, ask in both dialects, stay up.

Run by ``scripts/quickstart`` with whatever Python it finds, before anything is installed: so it
needs the standard library only. Whatever goes wrong is one sentence and exit status 1, with nothing
left running. The daemons' log is ``.cache/quickstart-PORT.log``, after the gateway's port.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from answers import MODEL, Address, Trouble, answered, ask_everything

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("CORTEX_VENV") or ROOT / ".venv")
LOGS = ROOT / ".cache"
ADDRESSES = {
    "--listen": ("127.0.0.1:31313", "where clients connect"),
    "--neuron-listen": ("127.0.0.1:13131", "the neuron's own API"),
    "--metrics-listen": ("127.0.0.1:31314", "the gateway's metrics"),
}
STALL_SECONDS = 300.0
STOP_SECONDS = 150.0  # each daemon gives running requests 60, one after the other
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
PHASES = {"downloading": "downloading and unpacking"}
STOPPED = "cortex up stopped: "
SLOW = "CPU kernels are not available"


def address(text: str) -> Address:
    """Parse HOST:PORT, for argparse."""
    found = re.fullmatch(r"(?:\[([^\]\s]+)\]|([^:\[\]\s]+)):(\d{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return Address(found[1] or found[2], int(found[3]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Install cortex, start a gateway and a neuron on this machine, load the "
        "embedded model, ask it a question in both dialects, and stay up until Ctrl-C.",
    )
    parser.add_argument(
        "--exit", action="store_true", help="stop after the answers: status 0, or 1 without Paris"
    )
    for option, (default, meaning) in ADDRESSES.items():
        parser.add_argument(
            option,
            type=address,
            default=default,
            metavar="HOST:PORT",
            help=f"{meaning} (default {default}; port 0 takes a free one)",
        )
    return parser.parse_args()


def bound(option: str, wanted: Address) -> socket.socket:
    """Return a socket bound to *wanted*, which proves that the port is free."""
    try:
        family, kind, *_, target = socket.getaddrinfo(
            wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        holder = socket.socket(family, kind)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(target)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise Trouble(
                f"port {wanted.port} is taken by another program; choose one with {option}."
            ) from exc
        raise Trouble(f"cannot listen on {wanted} ({option}): {exc.strerror}.") from exc
    return holder


def free_addresses(wanted: dict[str, Address]) -> dict[str, Address]:
    """Return the addresses with real ports; all are held at once so that no two are the same."""
    with contextlib.ExitStack() as held:
        ports = {
            option: held.enter_context(bound(option, place)).getsockname()[1]
            for option, place in wanted.items()
        }
    return {option: Address(place.host, ports[option]) for option, place in wanted.items()}


def install() -> None:
    """Run scripts/install, which says itself what it does and what went wrong."""
    status = subprocess.run([ROOT / "scripts" / "install"], check=False).returncode
    if status:
        raise SystemExit(status if status > 0 else 1)


def fetched(place: Address, path: str) -> Any:
    """Return the JSON that a GET answers, or None as long as nobody does."""
    try:
        with answered(place, path) as response:
            return json.load(response)
    except (OSError, http.client.HTTPException, Trouble, ValueError):
        return None


def die_with_parent() -> Callable[[], None]:
    """Return what makes a forked child get SIGTERM when this process ends, however it ends."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Stack:
    """``cortex up``, in a session of its own: Ctrl-C reaches this process only, which stops it."""

    def __init__(self, addresses: dict[str, Address], *options: str) -> None:
        self.gateway = addresses["--listen"].reachable
        self.neuron = addresses["--neuron-listen"].reachable
        command = [str(VENV / "bin" / "cortex"), "up", "--model", MODEL, *options]
        for option, place in addresses.items():
            command += [option, str(place)]
        LOGS.mkdir(exist_ok=True)
        self.log = LOGS / f"quickstart-{self.gateway.port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 (this process has one thread)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it and wait; a second Ctrl-C, or a daemon that does not end, gets SIGKILL."""
        try:
            if self.process.poll() is None:
                print(
                    "quickstart: stopping; what runs may finish, Ctrl-C again ends it", flush=True
                )
            self.process.terminate()
            self.process.wait(STOP_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            self.process.kill()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def raise_if_ended(self) -> None:
        """Raise Trouble with the log's last words once the stack is gone."""
        status = self.process.poll()
        if status is not None and status < 0:
            raise Trouble(f"cortex up was killed by signal {-status}; log: {self.log}")
        if status is not None:
            words = last_words(self.log)
            raise Trouble(f"cortex up ended with status {status}: {words}; log: {self.log}")

    def is_serving(self) -> bool:
        """Whether the gateway lists the model as loaded."""
        listing = fetched(self.gateway, "/v1/models") or {}
        return any(m["id"] == MODEL and m.get("loaded") for m in listing.get("data", []))

    def loading(self) -> dict[str, Any]:
        """Return what the neuron says of the model: status, progress, failure."""
        models = fetched(self.neuron, "/models") or []
        return next((model for model in models if model["id"] == MODEL), {})

    def wait_until_serving(self) -> None:
        """Wait as long as something moves, and show it."""
        line = ProgressLine()
        seen, since = self.loading(), time.monotonic()
        while not self.is_serving():
            self.raise_if_ended()
            state = self.loading()
            if state.get("status") == "failed":
                raise Trouble(f"{MODEL} cannot be loaded: {state.get('failure')}; log: {self.log}")
            if state != seen:
                seen, since = state, time.monotonic()
            if time.monotonic() - since > STALL_SECONDS:
                raise Trouble(f"nothing moved for {STALL_SECONDS:.0f} s; log: {self.log}")
            line.show(state.get("progress") or {})
            time.sleep(POLL_SECONDS)
        line.end()

    def stay(self) -> None:
        """Say where it is and return at Ctrl-C; an end before that is Trouble."""
        with contextlib.suppress(KeyboardInterrupt):
            print(directions(self.gateway), "\nCtrl-C stops it.", sep="", flush=True)
            self.process.wait()
            self.raise_if_ended()


def last_words(log: Path) -> str:
    """Return why ``cortex up`` says it stopped, or else the last thing it said."""
    lines = plain_lines(log)
    stopped = [line for line in lines if line.startswith(STOPPED)]
    return (stopped or lines or ["it said nothing"])[-1].removeprefix(STOPPED)


def plain_lines(log: Path) -> list[str]:
    """Return the log's lines for people; JSON lines are for machines."""
    lines = (line.strip() for line in log.read_text(errors="replace").splitlines())
    return [line for line in lines if line and not line.startswith("{")]


class ProgressLine:
    """A load's progress: one line that changes on a terminal, else a line per quarter."""

    def __init__(self) -> None:
        self._last: object = None
        self._on_terminal = sys.stdout.isatty()

    def show(self, progress: dict[str, Any]) -> None:
        """Show how far the neuron has come, where that is news."""
        phase, done = progress.get("phase"), progress.get("bytes_done", 0)
        total = progress.get("bytes_total", 0)
        news = (phase, done if self._on_terminal else done * 4 // total if total else 0)
        if phase is None or news == self._last:
            return
        self._last = news
        amount = f" {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else ""
        text = f"quickstart: {PHASES.get(phase, phase)} {MODEL}{amount}"
        print(f"\r{text:<78}" if self._on_terminal else f"{text}\n", end="", flush=True)

    def end(self) -> None:
        """Leave the line that changed."""
        if self._on_terminal and self._last is not None:
            print(flush=True)


def directions(place: Address) -> str:
    """Return how to point clients at the gateway."""
    url = f"http://{place}"
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]})
    return f"""
Point your client here ({url}, model {MODEL}; no key is asked for, any will do):

  curl           curl {url}/v1/chat/completions -H 'content-type: application/json' \\
                   -d '{body}'
  OpenAI SDK     OpenAI(base_url="{url}/v1", api_key="none")
  Anthropic SDK  Anthropic(base_url="{url}", api_key="none")
  Claude Code    ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=none \\
                   ANTHROPIC_MODEL={MODEL} ANTHROPIC_DEFAULT_HAIKU_MODEL={MODEL} \\
                   CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 claude
                 (it sends tools with every request: refused in words until tools are served)
  Codex          codex -m {MODEL} -c model_provider=cortex -c model_providers.cortex.name=cortex \\
                   -c model_providers.cortex.base_url={url}/v1 \\
                   -c model_providers.cortex.wire_api=responses
"""


def interrupt(*_: object) -> None:
    """Treat SIGTERM and SIGHUP like Ctrl-C."""
    raise KeyboardInterrupt


def serve(options: argparse.Namespace) -> None:
    """Do all of it."""
    wanted = {name: getattr(options, name[2:].replace("-", "_")) for name in ADDRESSES}
    free_addresses(wanted)  # say it now, not after minutes of installation
    install()
    start = time.monotonic()
    with Stack(free_addresses(wanted)) as stack:
        print("quickstart: starting the gateway and the neuron", flush=True)
        stack.wait_until_serving()
        print(f"quickstart: {MODEL} serves after {time.monotonic() - start:.1f} s")
        for line in plain_lines(stack.log):
            if SLOW in line:
                print(f"quickstart: {line}")
        ask_everything(stack.gateway)
        if not options.exit:
            stack.stay()


def main() -> int:
    """Return the exit status: 0 asked and answered, 1 trouble, 130 stopped before that."""
    options = arguments()
    signal.signal(signal.SIGINT, interrupt)  # which a shell's "&" would have ignored
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, interrupt)
    try:
        serve(options)
    except Trouble as exc:
        print(f"quickstart: {exc}", file=sys.stderr)
        return 1
    except (OSError, http.client.HTTPException) as exc:
        print(f"quickstart: {exc!r}; the log is in {LOGS}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
