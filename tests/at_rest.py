"""A neuron that gets bad input, and is looked at afterwards: nothing may be left of any request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiohttp.web import Application

from cortex.runtime.routes import SERVICES, Services
from fake_node import FakeNode, serving
from raw_http import Answer, Wire, head, wire

MODEL = "m"
TEXT_THREADS = 4


@contextlib.asynccontextmanager
async def attacked(node: FakeNode | None = None, **options: Any) -> AsyncIterator[int]:
    """Serve *node*, or one with the model ``m``; yield its port, and see that it comes to rest."""
    node = node or FakeNode(MODEL)
    async with serving(node, **options) as client:
        assert client.port is not None, "it is served"
        yield client.port
        application = client.server.app  # type: ignore[attr-defined]  # BaseTestServer hides it
        assert isinstance(application, Application)
        await check_at_rest(node, application[SERVICES], client.port)


async def check_at_rest(node: FakeNode, services: Services, port: int) -> None:
    """Fail unless no request, no seat, no token and no thread is held, and the neuron answers."""
    async with asyncio.timeout(10):
        await services.door.empty()
        await asyncio.gather(*(services.threads.run(int) for _ in range(TEXT_THREADS)))
    async with wire(port) as connection:
        health = await asked(connection, head("GET", "/health"))
    assert health.status == 200
    for model in health.json["models"]:
        assert (model["in_flight"], model["queue_depth"]) == (0, 0)
        assert model["kv_available_mb"] == model["kv_budget_mb"]
    assert all(generation.was_left for generation in node.generations)
    assert node.embedding == []


async def asked(connection: Wire, sent: bytes) -> Answer:
    """Send and read at once, as a request may be more than the buffers take."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(connection.send(sent))
        return await connection.answer()
