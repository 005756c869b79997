"""Nodes that break: another replica before the first byte, an error frame after it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from aiohttp import web

from cortex.gateway.app import Gateway
from cortex.ipc.errors import ModelNotFound, Overloaded, Recovering, ShuttingDown
from fakes import QUICK, FakeNeuron, gateway_config, until

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "m", "messages": []}
STREAM = {**ASK, "stream": True}
BODIES = pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, body: dict[str, Any]
) -> tuple[int, str, str | None]:
    async with session.post(gateway.url + CHAT, json=body) as response:
        return response.status, await response.text(), response.headers.get("x-cortex-node")


def code(text: str) -> str:
    said: str = orjson.loads(text.removeprefix("data: "))["error"]["code"]
    return said


@BODIES
async def test_a_node_that_breaks_before_its_first_byte_is_replaced(
    session: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        a.breaks = True
        async with Gateway(gateway_config(a, b)) as gateway:
            status, _, node = await ask(session, gateway, body)

    assert (status, node) == (200, "b")
    assert len(a.requests(CHAT)) == len(b.requests(CHAT)) == 1


@pytest.mark.parametrize("refusal", [Overloaded, Recovering, ShuttingDown])
async def test_a_node_that_cannot_now_is_replaced(
    session: aiohttp.ClientSession, refusal: type[Overloaded]
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        a.refuses = refusal("not now")
        async with Gateway(gateway_config(a, b)) as gateway:
            status, _, node = await ask(session, gateway, STREAM)

    assert (status, node) == (200, "b")


async def test_when_every_replica_refuses_the_last_word_counts(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        a.breaks = True
        b.refuses = Overloaded("full")
        async with Gateway(gateway_config(a, b)) as gateway:
            status, text, _ = await ask(session, gateway, ASK)

    assert (status, code(text)) == (503, "overloaded")


@BODIES
async def test_without_another_replica_a_broken_node_is_502(
    session: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.breaks = True

        status, text, _ = await ask(session, gateway, body)

    assert (status, code(text)) == (502, "node_failed")


async def test_a_node_that_dies_in_mid_stream_ends_it_with_an_error_and_no_done(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        a.dies_after_tokens = 1
        async with Gateway(gateway_config(a, b)) as gateway:
            status, text, _ = await ask(session, gateway, STREAM)

    *_, frame, rest = text.split("\n\n")
    assert (status, code(frame), rest) == (200, "node_failed", "")
    assert "Hello" in text
    assert "[DONE]" not in text
    assert b.requests(CHAT) == []


async def test_a_stream_that_ends_without_done_is_not_taken_for_complete(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.ends_after_tokens = 1

        _, text, _ = await ask(session, gateway, STREAM)

    assert code(text.split("\n\n")[-2]) == "node_failed"


async def test_a_nodes_error_frame_is_passed_on_once(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.fails_after_tokens = 1

        _, text, _ = await ask(session, gateway, STREAM)

    assert text.count('"error"') == 1
    assert text.endswith('"code":"node_failed"}}\n\n')


@BODIES
async def test_a_node_that_stays_silent_is_504(
    session: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    timeouts = msgspec.structs.replace(QUICK, between_bytes_seconds=0.1)
    async with FakeNeuron(["m"]) as a:
        a.may_begin.clear()
        async with Gateway(gateway_config(a, timeouts=timeouts)) as gateway:
            status, text, _ = await ask(session, gateway, body)

    assert (status, code(text)) == (504, "node_timeout")


async def test_a_node_that_falls_silent_in_mid_stream_ends_it_with_an_error(
    session: aiohttp.ClientSession,
) -> None:
    timeouts = msgspec.structs.replace(QUICK, between_bytes_seconds=0.1)
    async with FakeNeuron(["m"]) as a:
        a.may_finish.clear()
        async with Gateway(gateway_config(a, timeouts=timeouts)) as gateway:
            _, text, _ = await ask(session, gateway, STREAM)

    assert code(text.split("\n\n")[-2]) == "node_timeout"


async def test_a_model_that_was_unloaded_since_the_poll_is_loaded_again(
    session: aiohttp.ClientSession,
) -> None:
    timeouts = msgspec.structs.replace(QUICK, poll_seconds=60)
    async with (
        FakeNeuron(["smollm2-135m-instruct"]) as a,
        Gateway(gateway_config(a, timeouts=timeouts)) as gateway,
    ):
        await gateway.poller.first_round()
        a.models.clear()
        body = {**ASK, "model": "smollm2-135m-instruct"}
        status, _, _ = await ask(session, gateway, body)

    assert (status, len(a.requests("/models/load"))) == (200, 1)


async def test_a_node_that_denies_what_it_shows_is_not_asked_for_ever(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.refuses = ModelNotFound("not here")

        status, text, _ = await ask(session, gateway, ASK)

    assert (status, code(text), len(a.requests(CHAT))) == (404, "model_not_found", 2)


async def serving(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    session: aiohttp.ClientSession,
    body: dict[str, Any],
) -> tuple[int, str]:
    """Return what the gateway makes of a node whose inference is *answer*."""

    class OddNeuron(FakeNeuron):
        async def _infer(self, request: web.Request) -> web.StreamResponse:
            return await answer(request)

    async with OddNeuron(["m"]) as odd, Gateway(gateway_config(odd)) as gateway:
        status, text, _ = await ask(session, gateway, body)
    return status, text


@pytest.mark.parametrize("body", ["<html>oops</html>", '{"error": "flat"}', "[]"])
async def test_an_error_page_of_a_node_becomes_an_error_object(
    session: aiohttp.ClientSession, body: str
) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text=body, content_type="text/html")

    status, text = await serving(answer, session, ASK)

    assert (status, code(text)) == (500, "node_failed")
    assert "<" not in text


async def test_an_empty_stream_is_a_failure(session: aiohttp.ClientSession) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(text="")

    status, text = await serving(answer, session, STREAM)

    assert (status, code(text)) == (502, "node_failed")


async def test_a_client_that_stops_reading_is_cut_off() -> None:
    timeouts = msgspec.structs.replace(QUICK, client_stalled_seconds=0.2)
    async with FakeNeuron(["m"]) as a:
        a.tokens = ["x" * 100_000] * 400
        async with Gateway(gateway_config(a, timeouts=timeouts)) as gateway:
            port = int(gateway.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            body = orjson.dumps(STREAM)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await a.answering.wait()

            await until(a.cancelled.is_set)
            await until(lambda: gateway.door.inside == 0)
            assert gateway.fleet.own("a") == {}
            writer.close()
            del reader


async def test_a_refusal_that_comes_in_pieces_is_read_whole(
    session: aiohttp.ClientSession,
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=422)
        await response.prepare(request)
        await response.write(b'{"error": {"code": "unloadable",')
        await asyncio.sleep(0.05)  # so that the pieces travel apart
        await response.write(b'"message": "why"}}')
        await response.write_eof()
        return response

    status, text = await serving(answer, session, ASK)

    assert (status, code(text)) == (422, "unloadable")


@pytest.mark.parametrize("status", [204, 307])
async def test_a_status_that_is_neither_answer_nor_refusal_is_a_failure(
    session: aiohttp.ClientSession, neuron: FakeNeuron, status: int
) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": neuron.url + CHAT})

    said = await serving(answer, session, ASK)

    assert (said[0], code(said[1])) == (502, "node_failed")
    assert neuron.received == []
