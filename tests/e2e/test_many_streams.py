"""A thousand streams at the same time through one gateway process."""

import asyncio
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import Holdings

from fakes import FakeNeuron
from stack import free_port, is_alive

STREAMS = 1000
WORDS = 20
MIB = 2**20
OWN_DESCRIPTORS = 4
"""Which a poll, or a write of the state, may have open at either look; a stream has two."""
STREAM_BYTES = 256 * 1024
"""What a stream may cost the gateway while it lives, everything counted."""


class Echo(FakeNeuron):
    """Says what it was asked, word by word, the last word when the test lets it."""

    def _says(self, body: dict[str, Any]) -> list[str]:
        word: str = body["messages"][0]["content"]
        return [f"{word} "] * WORDS


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    """Let this process have both ends of every stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def said(session: aiohttp.ClientSession, url: str, number: int) -> str:
    """Return the text of one stream, which must be whole."""
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": f"w{number}"}],
        "stream": True,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        assert response.status == 200
        text = (await response.read()).decode()
    assert text.endswith("data: [DONE]\n\n")
    return "".join(re.findall(r'"content":"([^"]*)"', text))


async def a_thousand(neuron: Echo, url: str, pid: int) -> Holdings:
    """Have them all at once, check each, and return what the gateway held in the middle."""
    neuron.may_finish.clear()
    unbounded = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=unbounded) as session, asyncio.TaskGroup() as group:
        before = len(neuron.received)
        streams = [group.create_task(said(session, url, n)) for n in range(STREAMS)]
        async with asyncio.timeout(60):
            while len(neuron.received) < before + STREAMS:  # noqa: ASYNC110  # a fake has no event
                await asyncio.sleep(0.05)
        held = Holdings.of(pid)
        neuron.may_finish.set()
    for number, stream in enumerate(streams):
        assert stream.result() == f"w{number} " * WORDS
    return held


async def serves(url: str) -> None:
    """Return once the gateway shows the model as loaded."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while True:
            try:
                async with session.get(f"{url}/v1/models") as response:
                    if any(entry["loaded"] for entry in (await response.json())["data"]):
                        return
            except aiohttp.ClientConnectorError:
                pass
            await asyncio.sleep(0.05)


async def test_none_is_lost_none_is_mixed_and_their_memory_is_given_back(tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    async with Echo(["m"]) as neuron:
        (tmp_path / "cortex.toml").write_text(
            f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
            f'[state]\ndirectory = "{tmp_path}"\n'
            f'[[neurons]]\nname = "a"\nendpoint = "{neuron.url}"\n'
        )
        command = [sys.executable, "-m", "cortex.gateway", "serve", "--config"]
        with (tmp_path / "log").open("wb") as log:
            config = str(tmp_path / "cortex.toml")
            gateway = await asyncio.create_subprocess_exec(*command, config, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            await serves(url)
            at_rest = Holdings.of(gateway.pid)
            first = await a_thousand(neuron, url, gateway.pid)
            second = await a_thousand(neuron, url, gateway.pid)
        finally:
            assert is_alive(gateway.pid)
            gateway.terminate()
            await gateway.wait()

    assert first.anonymous_bytes - at_rest.anonymous_bytes < STREAMS * STREAM_BYTES
    assert second.anonymous_bytes < first.anonymous_bytes + 16 * MIB
    assert second.descriptors <= first.descriptors + OWN_DESCRIPTORS
