"""The daemon: its parts wired together, its two ports, its life.

start    pool of connections, then both ports, then the poller; ready at once, nodes or not
serve    until somebody stops it
drain    new inference is refused with 503, what runs may finish within a minute
stop     what still runs ends with an error, ports closed
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import structlog
from aiohttp import web

from cortex.gateway.auth import authenticating
from cortex.gateway.background import Background
from cortex.gateway.catalogue import BUILT_IN, Catalogue
from cortex.gateway.config import GatewayConfig
from cortex.gateway.credentials import Credentials
from cortex.gateway.door import Door
from cortex.gateway.errors import errors_in_dialect, reason_of, refuse
from cortex.gateway.eviction import EvictionPolicy, NothingIsEvicted
from cortex.gateway.fleet import Fleet
from cortex.gateway.lifecycle import Lifecycle
from cortex.gateway.metrics import Metrics
from cortex.gateway.poller import Poller
from cortex.gateway.proxy import Proxy
from cortex.gateway.request_id import identify, name_the_answer
from cortex.gateway.routes import SERVICES, Services, add_routes
from cortex.gateway.upstream import NodeClient
from cortex.ipc.http_server import HttpRunner
from cortex.ipc.service_manager import feed_watchdog, notify
from cortex.ipc.settings import is_loopback, split_address

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
        eviction: EvictionPolicy | None = None,
    ) -> None:
        self.config = config
        self.catalogue = catalogue
        self.credentials = Credentials(config.neurons)
        self.door = Door()
        self.fleet = Fleet(config.neurons)
        self.metrics = Metrics(self.fleet)
        self._background = Background()
        self._client = NodeClient(config.timeouts, self.credentials)
        self.poller = Poller(self.fleet, self._client, config.timeouts)
        self.lifecycle = Lifecycle(
            fleet=self.fleet,
            poller=self.poller,
            client=self._client,
            background=self._background,
            eviction=eviction or NothingIsEvicted(),
            metrics=self.metrics,
            timeouts=config.timeouts,
        )
        self.url = ""
        self.metrics_url = ""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start; raise ConfigError for a file that *config* names, or CannotListen."""
        await asyncio.to_thread(self.credentials.read)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._client)
            await stack.enter_async_context(self._background)
            listening = self.config.gateway
            self.url = await _listen(stack, build_app(self.services()), listening.listen)
            metrics = build_metrics_app(self.metrics)
            self.metrics_url = await _listen(stack, metrics, listening.metrics_listen)
            self.poller.start(self._background)
            self._background.start(feed_watchdog(), "watchdog")
            self._stack = stack.pop_all()
        log.info("gateway listening", url=self.url, metrics_url=self.metrics_url)
        host, _ = split_address(self.config.gateway.listen)
        if not (is_loopback(host) or self.config.entitlements.require_auth):
            log.warning("anybody who reaches this port may use it", url=self.url)
        self.credentials.warn()
        notify("READY=1")
        return self

    def services(self) -> Services:
        """Return what the handlers work with."""
        proxy = Proxy(
            fleet=self.fleet,
            poller=self.poller,
            lifecycle=self.lifecycle,
            client=self._client,
            catalogue=self.catalogue,
            metrics=self.metrics,
            door=self.door,
            timeouts=self.config.timeouts,
        )
        return Services(
            config=self.config,
            catalogue=self.catalogue,
            fleet=self.fleet,
            poller=self.poller,
            lifecycle=self.lifecycle,
            proxy=proxy,
            client=self._client,
            door=self.door,
        )

    async def drain(self) -> None:
        """Refuse new inference and wait for what runs, as long as the configuration allows."""
        notify("STOPPING=1")
        log.info("gateway draining", requests_in_flight=self.door.inside)
        if not await self.door.close(self.config.timeouts.drain_seconds):
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
        middlewares=[identify, errors_in_dialect, authenticating(services.config.entitlements)]
    )
    app[SERVICES] = services
    app.on_response_prepare.append(name_the_answer)
    add_routes(app)
    return app


def build_metrics_app(metrics: Metrics) -> web.Application:
    """Return the application of the metrics port."""

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": METRICS_TYPE})

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
