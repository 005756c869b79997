"""The neuron's application in a thread of its own, for clients that block."""

from __future__ import annotations

from at_rest import check_at_rest
from cortex.runtime.routes import SERVICES, Services
from fake_node import FakeNode, serving
from own_thread import OwnThread


class NeuronThread(OwnThread):
    """A context manager; ``url`` is where the neuron in front of *node* is served."""

    def __init__(self, node: FakeNode) -> None:
        super().__init__()
        self.node = node
        self._port = 0
        self._services: Services | None = None

    def check_at_rest(self) -> None:
        """Fail where something is left of a request."""
        assert self._services is not None
        self.do(check_at_rest(self.node, self._services, self._port))

    async def serve(self) -> None:
        """Serve until it is over."""
        async with serving(self.node) as client:
            assert client.port is not None
            self.url, self._port = str(client.make_url("/")).rstrip("/"), client.port
            self._services = client.server.app[SERVICES]  # type: ignore[attr-defined]  # hidden
            await self.until_over()
