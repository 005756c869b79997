"""Fixtures of the gateway's tests."""

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import structlog
from blockbuster import BlockBuster, blockbuster_ctx
from structlog.typing import EventDict


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop() -> Iterator[BlockBuster]:
    """Fail a test in which code of the gateway blocks the event loop."""
    with blockbuster_ctx("cortex.gateway") as blockbuster:
        yield blockbuster


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[EventDict]]:
    """What has been logged, with the context it was logged in."""
    bound = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=bound) as entries:
        yield entries


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps every byte as it comes."""
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        yield client
