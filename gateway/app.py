"""The daemon: its parts wired together, its two ports, its life.

start    pool of connections, then both ports, then the poller; ready at once, nodes or not
serve    until somebody stops it
drain    new inference is refused with 503, what runs may finish within a minute
stop     what still runs ends with an error, ports closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from aiohttp import web

from cortex.gateway.auth import authenticating
from cortex.gateway.background import Background
from cortex.gateway.budgets import Budgets
from cortex.gateway.catalogue import BUILT_IN, Catalogue
from cortex.gateway.config import GatewayConfig
from cortex.gateway.credentials import Credentials
from cortex.gateway.door import Door
from cortex.gateway.drains import Drains
from cortex.gateway.errors import errors_in_dialect, reason_of, refuse
from cortex.gateway.fleet import Fleet
from cortex.gateway.footprints import Footprints
from cortex.gateway.gauges import BudgetGauges, FleetGauges
from cortex.gateway.housekeeper import Housekeeper
from cortex.gateway.last_known import LastKnown
from cortex.gateway.ledger import Ledger
from cortex.gateway.lifecycle import Lifecycle
from cortex.gateway.loop_lag import watch_loop_lag
from cortex.gateway.metrics import Metrics
from cortex.gateway.pins import Pins
from cortex.gateway.poller import Poller
from cortex.gateway.proxy import Proxy
from cortex.gateway.reload import Reload
from cortex.gateway.request_id import identify, name_the_answer
from cortex.gateway.response_store import ResponseStore
from cortex.gateway.route_table import CORTEX
from cortex.gateway.routes import DOCUMENT
from cortex.gateway.services import SERVICES, Services
from cortex.gateway.state import StateFile
from cortex.gateway.upstream import NodeClient
from cortex.gateway.written import Written
from cortex.ipc.http_server import HttpRunner
from cortex.ipc.openapi import document
from cortex.ipc.service_manager import feed_watchdog, notify
from cortex.ipc.settings import is_loopback, split_address
from cortex.ipc.version import BUILD

CLOSING_SECONDS = 1.0
"""What the ports give to connections when they close; requests have been waited for before."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
log = structlog.get_logger()


class CannotListen(Exception):
    """A port is taken, or is not ours to take."""

    def __init__(self, address: str, error: OSError | UnicodeError) -> None:
        why = reason_of(error) if isinstance(error, OSError) else "this is no name of a host"
        super().__init__(f"cannot listen on {address}: {why}")


class Gateway:
    """An async context manager; entered and left by the same task."""

    def __init__(
        self,
        config: GatewayConfig,
        catalogue: Catalogue = BUILT_IN,
        state: Path | None = None,
    ) -> None:
        self.written = Written(config, catalogue)
        self.credentials = Credentials(config.nodes)
        self.door = Door()
        self.state = StateFile(state)
        self.responses = ResponseStore(self.state, self.written)
        self.fleet = Fleet(config.neurons, config.engines)
        self.footprints = Footprints(self.state)
        self.ledger = Ledger(self.state)
        self.budgets = Budgets(self.state, self.fleet)
        self.metrics = Metrics(
            FleetGauges(self.fleet, self.written), BudgetGauges(self.budgets, self.written)
        )
        self._background = Background()
        self._client = NodeClient(self.written, self.credentials)
        self.poller = Poller(self.fleet, self._client, self.written)
        self.lifecycle = Lifecycle(
            fleet=self.fleet,
            poller=self.poller,
            client=self._client,
            background=self._background,
            footprints=self.footprints,
            metrics=self.metrics,
            written=self.written,
        )
        self.last_known = LastKnown(self.state)
        self.pins = Pins(self.fleet, self.state)
        self.drains = Drains(self.fleet, self.state)
        self.housekeeper = Housekeeper(
            fleet=self.fleet,
            poller=self.poller,
            client=self._client,
            lifecycle=self.lifecycle,
            background=self._background,
            written=self.written,
        )
        self.url = ""
        self.metrics_url = ""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start; raise ConfigError for a file that *config* names, or CannotListen."""
        await asyncio.to_thread(self.credentials.read)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.state)
            await self.last_known.read()
            await self.pins.read()
            await self.drains.read()
            await self.footprints.read()
            await self.budgets.read()
            await self.responses.read()
            await stack.enter_async_context(self._client)
            await stack.enter_async_context(self._background)
            listening = self.written.config.gateway
            self.url = await _listen(stack, build_app(self.services()), listening.listen)
            metrics = build_metrics_app(self.metrics)
            self.metrics_url = await _listen(stack, metrics, listening.metrics_listen)
            self.poller.start(self._background)
            self._background.start(self.housekeeper.run(), "housekeeping")
            self._background.start(watch_loop_lag(self.metrics.loop_lag.observe), "loop lag")
            self._background.start(
                self.last_known.run(self.fleet, self.written), "what models can do"
            )
            self._background.start(feed_watchdog(), "watchdog")
            self._stack = stack.pop_all()
        log.info("gateway listening", url=self.url, metrics_url=self.metrics_url)
        host, _ = split_address(self.written.config.gateway.listen)
        if not (is_loopback(host) or self.written.config.entitlements.require_auth):
            log.warning("anybody who reaches this port may use it", url=self.url)
        self.credentials.warn()
        notify("READY=1")
        return self

    def reload(self, read: Callable[[], Written]) -> Reload:
        """Return what puts in place what *read* returns."""
        return Reload(
            read, self.written, self.credentials, self.fleet, self.poller, self._background
        )

    def services(self) -> Services:
        """Return what the handlers work with."""
        proxy = Proxy(
            fleet=self.fleet,
            poller=self.poller,
            lifecycle=self.lifecycle,
            client=self._client,
            metrics=self.metrics,
            door=self.door,
            written=self.written,
            budgets=self.budgets,
            ledger=self.ledger,
        )
        return Services(
            written=self.written,
            state=self.state,
            responses=self.responses,
            fleet=self.fleet,
            poller=self.poller,
            last_known=self.last_known,
            lifecycle=self.lifecycle,
            pins=self.pins,
            drains=self.drains,
            proxy=proxy,
            client=self._client,
            metrics=self.metrics,
            door=self.door,
            ledger=self.ledger,
        )

    async def drain(self) -> None:
        """Refuse new inference and wait for what runs, as long as the configuration allows."""
        notify("STOPPING=1")
        log.info("gateway draining", requests_in_flight=self.door.inside)
        if not await self.door.close(self.written.config.timeouts.drain_seconds):
            log.warning("requests cut off by the stop", requests_in_flight=self.door.inside)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.door.cut()
        await self._stack.__aexit__(kind, error, traceback)


def build_app(services: Services) -> web.Application:
    """Return the application of the main port."""
    app = web.Application(
        middlewares=[identify, errors_in_dialect, authenticating(services.written)]
    )
    app[SERVICES] = services
    app.on_response_prepare.append(name_the_answer)
    app[DOCUMENT] = _document()
    app.add_routes([route.definition() for route in CORTEX.routes])
    return app


@cache
def _document() -> bytes:
    return document(CORTEX, BUILD.package_version)


def build_metrics_app(metrics: Metrics) -> web.Application:
    """Return the application of the metrics port."""

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=await metrics.exposition(), headers={"Content-Type": METRICS_TYPE})

    app = web.Application()
    app.add_routes([web.get("/metrics", exposition)])
    return app


async def _listen(stack: AsyncExitStack, app: web.Application, address: str) -> str:
    """Serve *app* at *address* and return its URL; raise CannotListen."""
    host, port = split_address(address)
    runner = HttpRunner(app, refuse, shutdown_timeout=CLOSING_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, port, backlog=1024)
    try:
        await site.start()
    except (OSError, UnicodeError) as exc:
        raise CannotListen(address, exc) from exc
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{runner.addresses[0][1]}"
