"""A gateway in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import GatewayConfig
from fakes import until


class GatewayThread:
    """A context manager; ``url`` is where the gateway is."""

    def __init__(self, config: GatewayConfig, catalogue: Catalogue) -> None:
        self.url = ""
        self._config = config
        self._catalogue = catalogue
        self._gateway: Gateway | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over: asyncio.Event | None = None
        self._is_served = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_served.wait(30), "the gateway does not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._loop is not None
        assert self._is_over is not None
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the gateway does not end"

    def check_at_rest(self) -> None:
        """Fail where a request is still inside; undo what operators have said of the nodes."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._rest(), self._loop).result(30)

    async def _rest(self) -> None:
        gateway = self._gateway
        assert gateway is not None
        await until(lambda: gateway.door.inside == 0)
        for node in gateway.fleet.snapshot().nodes:
            gateway.drains.undrain(node.name)

    async def _serve(self) -> None:
        self._loop, self._is_over = asyncio.get_running_loop(), asyncio.Event()
        async with Gateway(self._config, self._catalogue) as gateway:
            self.url, self._gateway = gateway.url, gateway
            self._is_served.set()
            await self._is_over.wait()
