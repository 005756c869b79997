"""The neuron's application in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

from at_rest import check_at_rest
from cortex.runtime.routes import SERVICES, Services
from fake_node import FakeNode, serving


class NeuronThread:
    """A context manager; ``url`` is where the neuron in front of *node* is served."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.url = ""
        self._port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._services: Services | None = None
        self._is_over: asyncio.Event | None = None
        self._is_served = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_served.wait(30), "the neuron does not start"
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
        assert not self._thread.is_alive(), "the neuron does not end"

    def check_at_rest(self) -> None:
        """Fail where something is left of a request."""
        assert self._loop is not None
        assert self._services is not None
        checking = check_at_rest(self.node, self._services, self._port)
        asyncio.run_coroutine_threadsafe(checking, self._loop).result(30)

    async def _serve(self) -> None:
        self._loop, self._is_over = asyncio.get_running_loop(), asyncio.Event()
        async with serving(self.node) as client:
            assert client.port is not None
            self.url, self._port = str(client.make_url("/")).rstrip("/"), client.port
            self._services = client.server.app[SERVICES]  # type: ignore[attr-defined]  # hidden
            self._is_served.set()
            await self._is_over.wait()
