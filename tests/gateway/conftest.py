"""Fixtures of the gateway's tests."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import structlog
from blockbuster import BlockBuster, blockbuster_ctx
from structlog.typing import EventDict

from fakes import until


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


@pytest.fixture(autouse=True)
async def _no_task_is_left_behind() -> AsyncIterator[None]:
    """Fail a test after which something still runs: gateways and fakes end with their block."""
    before = asyncio.all_tasks()
    yield
    this = asyncio.current_task()
    await until(lambda: asyncio.all_tasks() <= {*before, this})


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps every byte as it comes."""
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        yield client
