"""``cortex status`` and ``cortex chat`` against a gateway."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from rich.console import Console

from cortex.gateway import cli
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Entitlements, Key
from cortex.gateway.terminal import GatewayClient, Unreachable, print_fleet
from cortex.ipc.errors import Overloaded
from fakes import FakeNeuron, gateway_config

ASK = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(
    neuron: FakeNeuron, catalogue: Catalogue | None = None
) -> AsyncIterator[GatewayClient]:
    async with Gateway(gateway_config(neuron), catalogue or Catalogue()) as gateway:
        await gateway.poller.first_round()
        yield GatewayClient(gateway.url + "/", key=None)


async def test_an_answer_comes_as_it_forms(neuron: FakeNeuron) -> None:
    async with client_of(neuron) as client:
        pieces = [piece async for piece in client.answer("qwen3-8b", ASK)]

    assert pieces == ["Hello", " world"]


async def test_a_turn_is_printed_and_returned(
    neuron: FakeNeuron, capsys: pytest.CaptureFixture[str]
) -> None:
    async with client_of(neuron) as client:
        answer = await cli._turn(client, "qwen3-8b", ASK)

    assert (answer, capsys.readouterr().out) == ("Hello world", "Hello world\n")


async def test_a_loaded_model_is_taken_first(neuron: FakeNeuron) -> None:
    catalogue = Catalogue().with_profile("a-cold-one")

    async with client_of(neuron, catalogue) as client:
        assert await client.default_model() == "qwen3-8b"


async def test_any_model_is_taken_where_none_is_loaded() -> None:
    async with FakeNeuron() as neuron, client_of(neuron, Catalogue().with_profile("c")) as client:
        assert await client.default_model() == "c"


async def test_a_gateway_without_models_is_said() -> None:
    async with FakeNeuron() as neuron, client_of(neuron) as client:
        with pytest.raises(Unreachable, match="serves no model"):
            await client.default_model()


async def test_a_refusal_is_said_in_its_words(neuron: FakeNeuron) -> None:
    neuron.refuses = Overloaded("the queue is full")

    async with client_of(neuron) as client:
        with pytest.raises(Unreachable, match="the queue is full"):
            [_ async for _ in client.answer("qwen3-8b", ASK)]


async def test_a_stream_that_breaks_is_said(neuron: FakeNeuron) -> None:
    neuron.dies_after_tokens = 1

    async with client_of(neuron) as client:
        with pytest.raises(Unreachable, match="broke the connection"):
            [_ async for _ in client.answer("qwen3-8b", ASK)]


async def test_an_answer_that_breaks_off_is_said() -> None:
    async with FakeNeuron(["m"]) as neuron:  # asked directly: a gateway would add the error
        neuron.ends_after_tokens = 1
        with pytest.raises(Unreachable, match="broke off"):
            [_ async for _ in GatewayClient(neuron.url, None).answer("m", ASK)]


async def test_something_else_on_the_port_is_said() -> None:
    class NoGateway(FakeNeuron):
        async def _health(self, request: web.Request) -> web.Response:
            await self._polled(request)
            return web.Response(status=500, text="<html>")

    async with NoGateway() as neuron:
        with pytest.raises(Unreachable, match="status 500"):
            await GatewayClient(neuron.url, None).get("/health")


async def test_a_key_goes_along(neuron: FakeNeuron) -> None:
    doors = Entitlements(require_auth=True, keys=(Key("sk-right-key", "me"),))

    async with Gateway(gateway_config(neuron, entitlements=doors)) as gateway:
        assert await GatewayClient(gateway.url, "sk-right-key").get("/version")
        with pytest.raises(Unreachable, match="a valid key is needed"):
            await GatewayClient(gateway.url, None).get("/version")


async def test_the_fleet_is_shown_as_tables() -> None:
    async with FakeNeuron(["qwen3-8b"], "a") as a, FakeNeuron(name="b") as b:
        await b.stop()
        async with Gateway(gateway_config(a, b)) as gateway:
            await gateway.poller.first_round()
            client = GatewayClient(gateway.url, None)
            health, fleet = await client.get("/health"), await client.get("/fleet")
    console = Console(file=io.StringIO(), width=120)

    print_fleet(console, health, fleet)

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for shown in ("ok: 1 of 2 nodes up", "qwen3-8b", "cpu:0", "loaded", "1000", "broke the"):
        assert shown in text
