"""Whoever goes away, and whenever: one end, one line in the log, and nothing left behind."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Budget, Entitlements, Key
from fakes import FakeNeuron, gateway_config, until

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
PATHS = pytest.mark.parametrize("path", [CHAT, MESSAGES])
ASK: dict[str, Any] = {
    "model": "qwen3-8b",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
STREAM = {**ASK, "stream": True}
CATALOGUE = Catalogue({"cold": Profile("cold")})
BUDGET = Budget(10**6)
KEY = Key("sk-of-somebody", "somebody", budget=BUDGET)
Lines = list[dict[str, Any]]


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """One whose requests are counted against a budget."""
    async with aiohttp.ClientSession(headers={"x-api-key": KEY.key}) as asking:
        yield asking


@pytest.fixture
async def gateway(neuron: FakeNeuron) -> AsyncIterator[Gateway]:
    """A gateway whose node is up; one model is loaded there, another one could be."""
    config = gateway_config(neuron, entitlements=Entitlements(keys=(KEY,)))
    async with Gateway(config, CATALOGUE) as serving:
        await serving.poller.first_round()
        yield serving


async def the_end(gateway: Gateway, logged: Lines) -> dict[str, Any]:
    """Return the one line of the one request, once nothing of it is left."""
    await until(lambda: gateway.door.inside == 0)
    assert gateway.fleet.own("a") == {}
    assert gateway.budgets.told(KEY.id, BUDGET)["reserved_tokens"] == 0
    assert gateway.budgets.in_flight(KEY.id) == 0
    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    return line


@PATHS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_before_the_first_byte_ends_its_request_at_the_node(
    *,
    neuron: FakeNeuron,
    gateway: Gateway,
    session: aiohttp.ClientSession,
    logged: Lines,
    path: str,
    stream: bool,
) -> None:
    neuron.may_begin.clear()

    async with asyncio.TaskGroup() as group:
        asking = group.create_task(session.post(gateway.url + path, json={**ASK, "stream": stream}))
        await neuron.answering.wait()
        asking.cancel()

    line = await the_end(gateway, logged)
    assert (line["status"], line["code"], line["node"]) == (499, "client_gone", "a")
    await until(neuron.cancelled.is_set)


@PATHS
async def test_a_client_that_leaves_a_stream_ends_its_request_at_the_node(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession, logged: Lines, path: str
) -> None:
    neuron.may_finish.clear()

    async with session.post(gateway.url + path, json=STREAM) as response:
        await response.content.readuntil(b"Hello")
        response.close()

    line = await the_end(gateway, logged)
    assert (line["status"], line["code"], line["node"]) == (499, "client_gone", "a")
    await until(neuron.cancelled.is_set)


@PATHS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_while_a_model_loads_leaves_nothing_behind(
    *,
    neuron: FakeNeuron,
    gateway: Gateway,
    session: aiohttp.ClientSession,
    logged: Lines,
    path: str,
    stream: bool,
) -> None:
    neuron.may_load.clear()

    async with asyncio.TaskGroup() as group:
        body = {**ASK, "model": "cold", "stream": stream}
        asking = group.create_task(session.post(gateway.url + path, json=body))
        await until(lambda: neuron.requests("/models/load") != [])
        asking.cancel()

    line = await the_end(gateway, logged)
    assert (line["status"], line["code"], line["model"]) == (499, "client_gone", "cold")
    assert neuron.requests(CHAT) == []


async def test_a_client_that_leaves_before_its_body_is_complete_is_gone(
    gateway: Gateway, logged: Lines
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 99\r\n\r\n{{".encode())
    await until(lambda: gateway.door.inside == 1)

    writer.transport.abort()

    line = await the_end(gateway, logged)
    assert (line["status"], line["code"], line["model"]) == (499, "client_gone", "unknown")


@PATHS
@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("breaks", True),
        ("dies_after_tokens", 0),
        ("dies_after_tokens", 1),
        ("fails_after_tokens", 0),
        ("fails_after_tokens", 1),
        ("ends_after_tokens", 1),
    ],
)
async def test_a_node_that_goes_away_ends_the_request_once(
    *,
    neuron: FakeNeuron,
    gateway: Gateway,
    session: aiohttp.ClientSession,
    logged: Lines,
    path: str,
    how: str,
    when: int,
) -> None:
    setattr(neuron, how, when)

    async with session.post(gateway.url + path, json=STREAM) as response:
        text = await response.text()

    line = await the_end(gateway, logged)
    assert (line["status"], line["code"]) == (502, "node_failed")
    assert text.count('"error":') == 1
    assert "[DONE]" not in text
    assert "message_stop" not in text
    assert orjson.loads(text.split("data: ")[-1])["error"]["code"] == "node_failed"


async def test_a_gateway_that_is_left_ends_what_runs(
    neuron: FakeNeuron, session: aiohttp.ClientSession, logged: Lines
) -> None:
    neuron.may_finish.clear()
    async with Gateway(gateway_config(neuron)) as gateway:
        response = await session.post(gateway.url + CHAT, json=STREAM)

    line = await the_end(gateway, logged)
    assert (line["status"], line["code"]) == (503, "shutting_down")
    assert "[DONE]" not in await response.text()
    await until(neuron.cancelled.is_set)
