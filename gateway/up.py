"""``cortex up``: a gateway and a neuron on one machine, in the foreground, from defaults.

The gateway runs in this process. The neuron is a child, ``python -m cortex.runtime serve``, in a
session of its own, so that a Ctrl-C reaches us alone: we finish what runs, then stop it and wait
for it. The kernel sends it SIGTERM should we die (prctl(2), PR_SET_PDEATHSIG); its end is ours.

Nothing outlives it: pins, usage and stored responses are in memory, and no file is read again.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cortex.gateway.app import CannotListen, Gateway
from cortex.gateway.background import Background
from cortex.gateway.catalogue import BUILT_IN
from cortex.gateway.config import GatewayConfig, Listening, Neuron
from cortex.gateway.demands import Demand
from cortex.gateway.serving import INTERRUPTED, StopSignals
from cortex.gateway.terminal import LoadLines
from cortex.ipc.descriptors import allow_many_descriptors
from cortex.ipc.errors import ApiError
from cortex.ipc.settings import ConfigError, split_address

NAME = "local"
LOOK_SECONDS = 0.2
"""How often we look for the neuron while it starts."""
STOP_SECONDS = 75.0
"""What a neuron gets to stop: its own drain of 60 s, and a little."""
PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What ``cortex up`` was asked for; addresses are HOST:PORT."""

    listen: str
    metrics_listen: str
    neuron_listen: str
    model: str
    devices: str | None = None

    def command(self) -> list[str]:
        """Return the command line of the neuron."""
        command = [sys.executable, "-m", "cortex.runtime", "serve", "--listen", self.neuron_listen]
        return [*command, "--devices", self.devices] if self.devices else command

    def config(self) -> GatewayConfig:
        """Return the configuration of the gateway."""
        host, port = split_address(self.neuron_listen)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared only
        shown = f"[{host}]" if ":" in host else host
        return GatewayConfig(
            gateway=Listening(self.listen, self.metrics_listen),
            neurons=(Neuron(NAME, f"http://{shown}:{port}"),),
        )


class NeuronProcess:
    """The child; an async context manager that does not leave before it has ended."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Self:
        libc = ctypes.CDLL(None)  # loaded before the fork

        def die_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        self._process = await asyncio.create_subprocess_exec(
            *self._command, start_new_session=True, preexec_fn=die_with_parent
        )
        return self

    async def ended(self) -> int:
        """Return its exit status once it has one; negative is a signal."""
        assert self._process is not None
        return await self._process.wait()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        if self._process.returncode is not None:
            return
        if kind is asyncio.CancelledError:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Outcome:
    """Why we stop: asked to, or something has gone wrong."""

    def __init__(self, asked: asyncio.Event) -> None:
        self.failure: str | None = None
        self.over = asked

    def fail(self, why: str) -> None:
        """Stop, with exit status 1; the first reason counts."""
        self.failure = self.failure or why
        self.over.set()


def check_port_is_free(address: str) -> None:
    """Raise CannotListen where somebody listens at *address*, ConfigError for port 0."""
    host, port = split_address(address)
    if not port:
        raise ConfigError(
            f"--neuron-listen {address!r}: the neuron needs a port that the gateway knows, not 0"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as exc:
            raise CannotListen(address, exc) from exc


async def up(plan: Plan, say: Say) -> int:
    """Run both until a signal or a failure; return the exit status."""
    allow_many_descriptors()
    check_port_is_free(plan.neuron_listen)
    signals = StopSignals(is_daemon=False)
    outcome = Outcome(signals.asked)
    try:
        async with (
            Gateway(plan.config(), BUILT_IN.with_profile(plan.model)) as gateway,
            NeuronProcess(plan.command()) as neuron,
            Background() as background,
        ):
            background.start(_watch(neuron, outcome), "neuron")
            background.start(_announce(gateway, plan.model, outcome, say), "readiness")
            await outcome.over.wait()
            await gateway.drain()
    except asyncio.CancelledError:
        if signals.is_impatient:
            return INTERRUPTED
        raise
    if outcome.failure:
        say(f"cortex up stopped: {outcome.failure}")
    return 1 if outcome.failure else 0


async def _watch(neuron: NeuronProcess, outcome: Outcome) -> None:
    status = await neuron.ended()
    if not outcome.over.is_set():
        said = f"signal {-status}" if status < 0 else f"exit status {status}"
        outcome.fail(f"the neuron has ended with {said}; what it said is above")


async def _announce(gateway: Gateway, model: str, outcome: Outcome, say: Say) -> None:
    """Load the model as soon as the neuron answers, and say where clients find it."""
    while not gateway.fleet.node(NAME).takes_requests:
        await asyncio.sleep(LOOK_SECONDS)
        await gateway.poller.refresh(NAME)
    target = gateway.written.catalogue.target(model)
    lines = LoadLines(say)

    async def tell(load: Demand) -> None:
        lines.hear(load.title, load.progress)

    try:
        await gateway.lifecycle.ready(target, heartbeat=tell)
    except ApiError as error:
        outcome.fail(str(error))
        return
    say(READY.format(url=gateway.url, metrics=gateway.metrics_url, model=model))


READY = """
cortex is ready

  model        {model}
  OpenAI       {url}/v1
  Anthropic    {url}
  metrics      {metrics}/metrics

  cortex chat --endpoint {url} "What is the capital of France?"
  Ctrl-C stops it.
"""
