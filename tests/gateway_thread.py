"""A gateway in a thread of its own, for clients that block."""

from __future__ import annotations

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import GatewayConfig
from fakes import until
from own_thread import OwnThread


class GatewayThread(OwnThread):
    """A context manager; ``url`` is where the gateway is."""

    def __init__(self, config: GatewayConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self._config = config
        self._catalogue = catalogue
        self._gateway: Gateway | None = None

    def check_at_rest(self) -> None:
        """Fail where a request is still inside; undo what operators have said of the nodes."""
        self.do(self._rest())

    async def _rest(self) -> None:
        gateway = self._gateway
        assert gateway is not None
        await until(lambda: gateway.door.inside == 0)
        for node in gateway.fleet.snapshot().nodes:
            gateway.drains.undrain(node.name)

    async def serve(self) -> None:
        """Serve until it is over."""
        async with Gateway(self._config, self._catalogue) as gateway:
            self.url, self._gateway = gateway.url, gateway
            await self.until_over()
