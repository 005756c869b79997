"""Chat and text completions through the gateway: passed on, byte for byte."""

import asyncio
import io
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.ipc.errors import ContextLengthExceeded, Overloaded
from cortex.ipc.node_api import MAX_BODY_BYTES
from fakes import FakeNeuron, gateway_config, until

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**ASK, "stream": True}


async def read(
    session: aiohttp.ClientSession, url: str, body: Any, **headers: str
) -> tuple[int, bytes, Mapping[str, str]]:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    async with session.post(url, data=io.BytesIO(data), headers=headers) as response:
        return response.status, await response.read(), response.headers


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
async def test_the_answer_is_the_nodes_byte_for_byte(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    neuron.keep_alives = 2

    async with Gateway(gateway_config(neuron)) as gateway:
        _, ours, _ = await read(session, gateway.url + path, body)
    usage = {"x-cortex-usage": "1"}
    _, theirs, _ = await read(session, neuron.url + path, body, **usage)

    assert ours == theirs


async def test_embeddings_are_the_nodes_byte_for_byte_and_in_the_clients_words(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    body = {"model": "qwen3-8b", "input": "hi"}
    catalogue = Catalogue({}, {"vectors": "qwen3-8b"})

    async with Gateway(gateway_config(neuron), catalogue) as gateway:
        _, ours, headers = await read(session, gateway.url + "/v1/embeddings", body)
        renamed = {**body, "model": "vectors"}
        _, aliased, _ = await read(session, gateway.url + "/v1/embeddings", renamed)
    _, theirs, _ = await read(session, neuron.url + "/v1/embeddings", body)

    assert ours == theirs
    assert headers["x-cortex-node"] == "a"
    assert orjson.loads(aliased) == {**orjson.loads(theirs), "model": "vectors"}
    assert neuron.requests("/v1/embeddings")[1].body == body


async def test_the_body_reaches_the_node_byte_for_byte(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    body = b'{ "model":"qwen3-8b",  "messages":[], "x": 1.0e0, "u": "\\u00e9" }'

    async with Gateway(gateway_config(neuron)) as gateway:
        await read(session, gateway.url + CHAT, body)

    assert neuron.received[0].headers["content-length"] == str(len(body))
    assert neuron.received[0].body == orjson.loads(body)


async def test_a_large_body_reaches_the_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    body = {**ASK, "messages": [{"role": "user", "content": "x" * 3_000_000}]}

    async with Gateway(gateway_config(neuron)) as gateway:
        status, _, _ = await read(session, gateway.url + CHAT, body)

    assert (status, neuron.received[0].body) == (200, body)


async def test_an_alias_is_rewritten_and_nothing_else(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    catalogue = Catalogue({}, {"gpt-9": "qwen3-8b"})

    async with Gateway(gateway_config(neuron), catalogue) as gateway:
        status, _, _ = await read(session, gateway.url + CHAT, {**ASK, "model": "gpt-9", "x": 1})

    assert (status, neuron.received[0].body) == (200, {**ASK, "x": 1})


async def test_a_stream_arrives_while_it_forms(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + CHAT, json=STREAM) as response,
    ):
        so_far = b""
        while b" world" not in so_far:
            so_far += await response.content.readany()
        assert b"[DONE]" not in so_far
        neuron.may_finish.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_stream_is_named_and_not_to_be_buffered(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, _, headers = await read(session, gateway.url + CHAT, STREAM, **{"x-request-id": "r1"})

    assert headers["Content-Type"].startswith("text/event-stream")
    assert (headers["x-cortex-node"], headers["x-cortex-reason"]) == ("a", "only-replica")
    assert (headers["X-Request-ID"], headers["Cache-Control"]) == ("r1", "no-cache")


async def test_an_answer_is_named_too(neuron: FakeNeuron, session: aiohttp.ClientSession) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, _, headers = await read(session, gateway.url + CHAT, ASK)

    assert (headers["x-cortex-node"], headers["x-cortex-reason"]) == ("a", "only-replica")


async def test_neither_secrets_nor_forged_headers_reach_a_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    forged = {
        "Authorization": "Bearer sk-secret",
        "x-api-key": "sk-secret",
        "x-cortex-key": "root",
        "x-cortex-priority": "0",
        "Cookie": "a=b",
    }

    async with Gateway(gateway_config(neuron)) as gateway:
        await read(session, gateway.url + CHAT, ASK, **forged, **{"x-request-id": "r1"})

    headers = neuron.received[0].headers
    assert not {name.lower() for name in forged} & headers.keys()
    assert (headers["x-request-id"], headers["x-cortex-usage"]) == ("r1", "1")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_json"),
        (b"\xff", 400, "malformed_json"),
        (b"[]", 400, "invalid_request"),
        (b"{}", 400, "missing_model_field"),
        (b'{"model": 3}', 400, "missing_model_field"),
        (b'{"model": "qwen3-8b", "stream": "yes"}', 400, "invalid_request"),
        (b'{"model": "nobody-has-it"}', 404, "model_not_found"),
    ],
)
async def test_a_request_that_cannot_be_routed_is_refused(
    neuron: FakeNeuron, session: aiohttp.ClientSession, body: bytes, status: int, code: str
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        answered, said, _ = await read(session, gateway.url + CHAT, body)

    assert (answered, orjson.loads(said)["error"]["code"]) == (status, code)
    assert neuron.received == []


async def test_a_body_that_is_too_large_is_413(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, said, _ = await read(session, gateway.url + CHAT, b" " * (MAX_BODY_BYTES + 1))

    assert (status, orjson.loads(said)["error"]["code"]) == (413, "body_too_large")


async def test_a_wrong_method_is_405(neuron: FakeNeuron, session: aiohttp.ClientSession) -> None:
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.get(gateway.url + CHAT) as response,
    ):
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
async def test_a_nodes_refusal_keeps_status_code_and_retry_after(
    neuron: FakeNeuron, session: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    neuron.refuses = Overloaded("the queue is full", retry_after_seconds=9)

    async with Gateway(gateway_config(neuron)) as gateway:
        status, said, headers = await read(session, gateway.url + CHAT, body)

    assert (status, headers["Retry-After"]) == (503, "9")
    assert orjson.loads(said) == neuron.refuses.body()


async def test_the_numbers_of_a_refusal_are_kept(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.refuses = ContextLengthExceeded.of(9000, 8192)

    async with Gateway(gateway_config(neuron)) as gateway:
        _, said, _ = await read(session, gateway.url + CHAT, ASK)

    assert orjson.loads(said)["error"]["prompt_tokens"] == 9000


async def test_a_client_that_leaves_a_stream_cancels_it_at_the_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        response = await session.post(gateway.url + CHAT, json=STREAM)
        await response.content.readany()
        response.close()

        await until(neuron.cancelled.is_set)
        await until(lambda: gateway.door.inside == 0)
        assert gateway.fleet.own("a") == {}


async def test_a_client_that_does_not_wait_for_an_answer_cancels_it_at_the_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway, asyncio.TaskGroup() as group:
        asking = group.create_task(read(session, gateway.url + CHAT, ASK))
        await neuron.answering.wait()
        asking.cancel()

        await until(neuron.cancelled.is_set)
