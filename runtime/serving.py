"""The life of a neuron, in order: look, bind, fork, listen, load, serve, drain, exit.

What can be wrong with the configuration or the address is found before any device process is
started. The fork server has been launched by then (``cli.py``: on the main thread, before any loop
or thread, and before the imports of this module, which take as long as a third of its own); uvloop
runs the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass

import structlog
import uvloop
from aiohttp import web

from cortex.ipc import service_manager
from cortex.ipc.descriptors import allow_many_descriptors
from cortex.ipc.settings import is_loopback
from cortex.ipc.taps import SUPERVISOR, Tap
from cortex.runtime.access import Access
from cortex.runtime.activation import Activation
from cortex.runtime.app import build_app, build_runner, build_services
from cortex.runtime.config import (
    DeviceSpec,
    EngineConfig,
    NeuronConfig,
    cuda_visible_devices,
    ordered_faults,
)
from cortex.runtime.device_budget import resolve_devices
from cortex.runtime.discovery import GpuProbe, Inventory, NvmlProbe
from cortex.runtime.footprints import Footprints
from cortex.runtime.hang_watch import Deadlines
from cortex.runtime.host import Host
from cortex.runtime.injection import InjectedFaults
from cortex.runtime.model_files import ModelFiles
from cortex.runtime.node import Node
from cortex.runtime.readings import Readings
from cortex.runtime.routes import Services
from cortex.runtime.supervisor import Supervisor
from cortex.runtime.version import Build

BACKLOG = 1024
GIL_SECONDS = 0.0005
"""How long a thread may keep the interpreter while another wants it, a tenth of Python's default:
with that a thread that read a checkpoint held up every answer of the loop by about 15 ms."""
LAST_FRAMES_SECONDS = 5.0
"""After the drain, for requests that were just failed to tell their clients so."""

GPU_OPTIONS = ("attention", "batch_invariant", "cuda_graphs")
"""Of [engine]; a CPU has nothing that they could change."""

log = structlog.get_logger()


class CannotListen(OSError):
    """The address cannot be bound; the text says which and why."""


def serve(config: NeuronConfig) -> None:
    """Run the neuron until it is told to stop; raise ConfigError or CannotListen.

    ``fork_server.prepare`` has been called.
    """
    allow_many_descriptors()
    sys.setswitchinterval(GIL_SECONDS)
    access = Access.of(config)
    files = ModelFiles(config.places)
    ordered_faults()  # one that is misspelled stops the start
    host = Surroundings.look()
    devices = resolve_devices(config, host.inventory, Host.read())
    say_what_has_no_effect(config.engine, devices)
    listener = bind(*config.address)
    uvloop.run(_serve(config, devices, listener, host, access=access, files=files))


def say_what_has_no_effect(engine: EngineConfig, devices: Sequence[DeviceSpec]) -> None:
    """Log the options of a GPU that are set where there is none."""
    if any(device.name.startswith("cuda") for device in devices):
        return
    usual = EngineConfig()
    ignored = [name for name in GPU_OPTIONS if getattr(engine, name) != getattr(usual, name)]
    if ignored:
        log.info("options of [engine] without effect: there is no GPU here", options=ignored)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What does not change while the neuron lives: the GPUs there are, and the build it is."""

    probe: GpuProbe
    inventory: Inventory
    build: Build

    @classmethod
    def look(cls) -> Surroundings:
        """Ask the driver and the installed packages."""
        probe = NvmlProbe()
        inventory = probe.inventory().visible(cuda_visible_devices())
        return cls(probe, inventory, Build.read())


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that owns the address but does not listen yet; raise CannotListen."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise CannotListen(f"cannot listen on {host}:{port}: {exc.strerror or exc}") from exc
    except UnicodeError as exc:  # of a name with an empty or an endless part
        raise CannotListen(f"cannot listen on {host}:{port}: this is no name of a host") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # only now does a second neuron on this port fail
    except OSError as exc:
        listener.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    return listener


class Stop:
    """The stop that was asked for; asking again hurries it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._is_hurried = False
        self._deadline: asyncio.Timeout | None = None

    def ask(self) -> None:
        """Ask for the stop: the first time in good order, then at once."""
        if self.asked.is_set():
            self._is_hurried = True
            if self._deadline is not None and not self._deadline.expired():
                self._deadline.reschedule(asyncio.get_running_loop().time())
        self.asked.set()

    async def patiently(self, finished: Awaitable[None], seconds: float) -> bool:
        """Wait for *finished*, at most *seconds* or until hurried; return whether it came."""
        try:
            async with asyncio.timeout(0 if self._is_hurried else seconds) as self._deadline:
                await finished
        except TimeoutError:
            return False
        finally:
            self._deadline = None
        return True


def hangups() -> asyncio.Event:
    """Return what SIGHUP sets, also under ``nohup``: here it ends nothing, it has files read."""
    heard = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, heard.set)
    return heard


async def _serve(
    config: NeuronConfig,
    devices: list[DeviceSpec],
    listener: socket.socket,
    host: Surroundings,
    *,
    access: Access,
    files: ModelFiles,
) -> None:
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.ask)
    hangup = hangups()
    port: int = listener.getsockname()[1]
    with contextlib.closing(_tap(config, port)) as tap:
        supervisor = Supervisor(
            devices,
            files=files,
            taps=tap,
            log_level=config.log_level,
            footprints=Footprints(config.cache_directory),
            deadlines=Deadlines(
                config.engine.step_deadline_seconds, config.engine.load_stall_seconds
            ),
            options=config.engine.options,
            faults=_faults(),
        )
        async with supervisor as node:
            readings = Readings(host.probe, host.inventory, node.devices)
            node.memory.foreign_use = readings.foreign_use_of
            await readings.refresh()
            activation = Activation(config.models)
            services = build_services(
                config,
                node,
                access=access,
                inventory=host.inventory,
                readings=readings,
                activation=activation,
                tap=tap,
                build=host.build,
            )
            beside = [
                readings.keep_fresh(),
                activation.run(node),
                access.reload_at(hangup),
                service_manager.feed_watchdog(),
            ]
            await run(services, listener, stop, config.drain_seconds, beside)


async def run(
    services: Services,
    listener: socket.socket,
    stop: Stop,
    drain_seconds: float,
    beside: Sequence[Coroutine[None, None, None]],
) -> None:
    """Listen, and serve until *stop* is asked for; drain. *beside* runs as long as that."""
    node = services.node
    runner = build_runner(build_app(services), LAST_FRAMES_SECONDS)
    await runner.setup()
    access = services.access
    context = access.ssl_context
    await web.SockSite(runner, listener, backlog=BACKLOG, ssl_context=context).start()
    service_manager.notify("READY=1")
    log.info(
        "neuron listening",
        address=_name(listener),
        devices=_names(node),
        tls=context is not None,
        needs_key=not access.is_open,
    )
    if access.is_open and not is_loopback(listener.getsockname()[0]):
        log.warning(
            "anybody who reaches this port may use it: set key_file in [auth]",
            address=_name(listener),
        )
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(work) for work in beside]
        await stop.asked.wait()
        await _drain(services, node, stop, drain_seconds)
        for task in running:
            task.cancel()
    await runner.cleanup()
    log.info("neuron stopped")


async def _drain(services: Services, node: Node, stop: Stop, seconds: float) -> None:
    """Refuse what is new, let what runs finish, and fail what does not in time."""
    service_manager.notify("STOPPING=1")
    services.report.is_draining = True
    services.door.close()
    log.info("neuron draining", patience_seconds=seconds)
    if not await stop.patiently(services.door.empty(), seconds):
        log.warning("requests cut off by the stop")
    await node.drain(0)


def _faults() -> InjectedFaults | None:
    """Return what a test wants to go wrong; None, for all but tests."""
    ordered = ordered_faults()
    if not ordered:
        return None
    log.warning("faults will be injected, because a test asks for them", faults=ordered)
    return InjectedFaults(ordered)


def _tap(config: NeuronConfig, port: int) -> Tap:
    """Return the supervisor's tap; one that cannot be bound is no reason not to serve."""
    if not config.taps.enabled:
        return Tap(None, SUPERVISOR)
    directory = config.tap_directory(port)
    try:
        return Tap(directory, SUPERVISOR)
    except OSError as exc:
        log.warning("debug tap not bound", directory=str(directory), error=str(exc))
        return Tap(None, SUPERVISOR)


def _name(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"


def _names(node: Node) -> list[str]:
    return [device.spec.name for device in node.devices]
