"""The client of ``cortex status``, ``cortex chat`` and the others, against a gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from cortex.gateway import cli
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Entitlements, Key
from cortex.gateway.terminal import (
    GatewayClient,
    LoadLines,
    Unreachable,
    progress_words,
)
from cortex.ipc.errors import Overloaded, RouteNotFound
from cortex.ipc.node_api import EMBEDDED_MODEL, Progress
from cortex.ipc.settings import ConfigError
from fakes import FakeNeuron, gateway_config, refusal

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
        assert await client.default_models() == ["qwen3-8b"]


async def test_any_model_is_taken_where_none_is_loaded() -> None:
    async with FakeNeuron() as neuron, client_of(neuron, Catalogue().with_profile("c")) as client:
        assert await client.default_models() == ["c"]


async def test_the_embedded_model_is_taken_before_others_that_are_cold() -> None:
    catalogue = Catalogue({name: Profile(name) for name in ("a", EMBEDDED_MODEL)})
    async with FakeNeuron() as neuron, client_of(neuron, catalogue) as client:
        assert await client.default_models() == [EMBEDDED_MODEL, "a"]


async def test_a_gateway_without_models_is_said() -> None:
    async with FakeNeuron() as neuron, client_of(neuron) as client:
        with pytest.raises(Unreachable, match="serves no model"):
            await client.default_models()


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
            await GatewayClient(neuron.url, None).get("/health", "nodes")


async def test_a_key_goes_along(neuron: FakeNeuron) -> None:
    doors = Entitlements(require_auth=True, keys=(Key("sk-right-key", "me"),))

    async with Gateway(gateway_config(neuron, entitlements=doors)) as gateway:
        assert await GatewayClient(gateway.url, "sk-right-key").get("/version", "package_version")
        with pytest.raises(Unreachable, match="a valid key is needed"):
            await GatewayClient(gateway.url, None).get("/version", "package_version")


MB = 2**20


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress("queued"), "queued"),
        (
            Progress("downloading", 38 * MB, 94 * MB, 12.4),
            "downloading 40 %, 38 of 94 MB, 12 s left",
        ),
        (Progress("downloading", 1, 100 * MB, 600.0), "downloading 0 %, 0 of 100 MB, 10 min left"),
        (
            Progress("downloading", 5, 9000 * MB, 9000.0),
            "downloading 0 %, 0 of 9000 MB, 2.5 h left",
        ),
        (Progress("downloading", 7 * MB), "downloading, 7 MB"),
        (Progress("loading", 94 * MB, 94 * MB, 0.0), "loading 100 %, 94 of 94 MB, 0 s left"),
    ],
)
def test_progress_is_said_as_far_as_it_is_known(progress: Progress, words: str) -> None:
    assert progress_words(progress) == words


def test_a_load_is_told_by_its_phases_and_every_five_seconds() -> None:
    said: list[str] = []
    now = 100.0
    lines = LoadLines(said.append, lambda: now)

    lines.hear("loading m", None)
    for second in range(12):
        now = 100.0 + second
        lines.hear("loading m", Progress("downloading", second * MB, 20 * MB))
    lines.hear("loading m", Progress("loading", 0, 20 * MB))
    now += 60
    lines.hear("loading m", Progress("loading", 0, 20 * MB))

    assert said == [
        "loading m",
        "loading m: downloading 0 %, 0 of 20 MB",
        "loading m: downloading 25 %, 5 of 20 MB",
        "loading m: downloading 50 %, 10 of 20 MB",
        "loading m: loading 0 %, 0 of 20 MB",
    ]


@pytest.mark.parametrize(
    "endpoint", ["foo", "http://a:1/v1", "ftp://a", "http://", "http://a b", "127.0.0.1:31313"]
)
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT, without a path"):
        GatewayClient(endpoint, None)


async def test_a_port_that_cannot_be_is_said() -> None:
    with pytest.raises(Unreachable, match="--endpoint 'http://a:99999': nobody can be asked"):
        await GatewayClient("http://a:99999", None).get("/health", "nodes")


@pytest.mark.parametrize("key", ["bad\nkey", "bad\rkey", "nul\0", "caf\u00e9", "\udc80"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        GatewayClient("http://a:1", key)

    assert key not in str(caught.value)


async def test_a_neuron_is_told_from_a_gateway() -> None:
    class Neuron(FakeNeuron):
        async def _health(self, _: web.Request) -> web.Response:
            return refusal(RouteNotFound("there is no such path"))

    async with Neuron() as neuron:
        with pytest.raises(Unreachable, match="answers, but it is no cortex gateway"):
            await GatewayClient(neuron.url, None).get("/health", "nodes")


@pytest.mark.parametrize("body", ["<html>", "[]", "{}"])
async def test_what_answers_something_else_is_no_gateway(body: str) -> None:
    class Other(FakeNeuron):
        async def _health(self, _: web.Request) -> web.Response:
            return web.Response(text=body)

    async with Other() as other:
        with pytest.raises(Unreachable, match="answers, but it is no cortex gateway"):
            await GatewayClient(other.url, None).get("/health", "nodes")


async def test_an_answer_is_read_to_its_very_end() -> None:
    class Lingering(FakeNeuron):
        has_ended = False

        async def _events(self, request: web.Request, body: dict[str, Any]) -> AsyncIterator[str]:
            async for event in super()._events(request, body):
                yield event
            for _ in range(100):  # a client that hangs up at [DONE] is noticed within these
                await asyncio.sleep(0)
                yield ": not over yet"
            self.has_ended = True

    async with Lingering(["m"]) as neuron:
        pieces = [piece async for piece in GatewayClient(neuron.url, None).answer("m", ASK)]

    assert (pieces, neuron.has_ended) == (["Hello", " world"], True)
