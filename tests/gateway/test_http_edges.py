"""What nobody should send, and somebody does: every answer is in words and in the dialect."""

import asyncio
import gzip
import zlib
from typing import Any

import aiohttp
import orjson
import pytest

import raw_http
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.ipc.node_api import MAX_BODY_BYTES
from fakes import FakeNeuron, gateway_config

ANTHROPIC = {"anthropic-version": "2023-06-01"}
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
ASK = orjson.dumps(
    {"model": "qwen3-8b", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
)


async def asked(
    session: aiohttp.ClientSession, url: str, method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any]]:
    async with session.request(method, url, data=b"{}", headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("path", "headers", "is_anthropic"),
    [
        ("/v1/files", {}, False),
        ("/v1/files", ANTHROPIC, True),
        ("/v1/messages/batches", {}, True),
        ("/v1/responses/resp_1/cancel", ANTHROPIC, False),
        ("/nothing", {}, False),
    ],
)
async def test_an_unknown_path_is_404_in_the_dialect_of_the_client(
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    path: str,
    headers: dict[str, str],
    is_anthropic: bool,
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, body = await asked(session, gateway.url + path, **headers)

    assert (status, body["error"]["code"]) == (404, "not_found")
    assert (body.get("type") == "error") == is_anthropic


async def test_a_wrong_method_is_told_which_are_right(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.delete(gateway.url + "/v1/messages") as response,
    ):
        body = await response.json()

    assert (response.status, response.headers["Allow"]) == (405, "POST")
    assert (body["type"], body["error"]["code"]) == ("error", "method_not_allowed")


async def test_what_clients_know_and_cannot_have_is_a_404_with_the_reason(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + "/v1/responses/compact", json={}) as response,
    ):
        body = await response.json()

    assert (response.status, response.headers.get("Allow")) == (404, None)
    assert body["error"]["code"] == "not_found"
    assert "puts no words of its own into prompts" in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status", "is_anthropic"),
    [
        ("/v1/responses", 405, False),
        (CHAT, 405, False),
        (MESSAGES, 405, True),
        ("/v1/realtime", 404, False),
    ],
)
async def test_an_upgrade_to_a_web_socket_is_refused_at_once(
    *, neuron: FakeNeuron, path: str, status: int, is_anthropic: bool
) -> None:
    upgrade = raw_http.head(
        "GET",
        path,
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        raw_http.wire(int(gateway.url.rpartition(":")[2])) as wire,
    ):
        await wire.send(upgrade)
        refused = await wire.answer()

    assert refused.status == status
    assert (refused.json.get("type") == "error") == is_anthropic
    assert ("no WebSocket" in refused.error["message"]) == (status == 405)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, COUNT])
async def test_a_body_that_is_nested_too_deeply_is_no_bug(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str
) -> None:
    deep = b'{"model":"qwen3-8b","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + path, data=deep) as response,
    ):
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (400, "malformed_json")


EXTREMES = [
    "18446744073709551616",
    "-9223372036854775809",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "1e999",
    "-1e999",
    "1E+400",
    "NaN",
    "-Infinity",
    "-0",
    "-0.0",
    "[" * 2000 + "]" * 2000,
    '{"a":' * 500 + "1" + "}" * 500,
    '"\\ud800"',
]
FIELDS = {
    CHAT: ("max_tokens", "temperature", "top_k", "seed", "stop", "messages", "metadata", "stream"),
    "/v1/completions": ("max_tokens", "temperature", "prompt", "logit_bias", "user"),
    MESSAGES: ("max_tokens", "temperature", "top_k", "stop_sequences", "system", "messages"),
    COUNT: ("max_tokens", "system", "messages", "metadata", "thinking", "tools"),
}


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, fields in FIELDS.items() for field in fields]
)
async def test_no_value_is_too_extreme_for_an_answer(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, field: str
) -> None:
    usual = {"max_tokens": "5", "messages": '[{"role": "user", "content": "hi"}]'}
    catalogue = Catalogue({}, {"alias": "qwen3-8b"})

    async with Gateway(gateway_config(neuron), catalogue) as gateway:
        for model in ('"qwen3-8b"', '"alias"'):
            for value in [*EXTREMES, *(f'[{{"role":"user","content":{it}}}]' for it in EXTREMES)]:
                asked = {**usual, "model": model, field: value}
                body = "{" + ",".join(f'"{name}":{said}' for name, said in asked.items()) + "}"
                async with session.post(gateway.url + path, data=body.encode()) as response:
                    said = await response.text()
                assert response.status < 500, (value[:40], said)


@pytest.mark.parametrize("number", ["18446744073709551616", "2147483648"])
async def test_too_many_tokens_are_refused_by_name(
    neuron: FakeNeuron, session: aiohttp.ClientSession, number: str
) -> None:
    body = ASK.replace(b'"max_tokens":5', b'"max_tokens":' + number.encode())

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + MESSAGES, data=body) as response,
    ):
        error = (await response.json())["error"]

    assert (response.status, error["code"], error["param"]) == (
        400,
        "invalid_request",
        "max_tokens",
    )


@pytest.mark.parametrize("path", [CHAT, MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("encoding", "body", "refusal"),
    [
        ("gzip", gzip.compress(ASK), None),
        ("deflate", zlib.compress(ASK), None),
        ("gzip", ASK, (400, "invalid_request")),
        ("gzip", gzip.compress(ASK)[:-20], (400, "invalid_request")),
        ("gzip", gzip.compress(bytes(MAX_BODY_BYTES + 1)), (413, "body_too_large")),
    ],
    ids=["gzip", "deflate", "no-gzip", "cut", "bomb"],
)
async def test_a_compressed_body_is_read_or_refused_in_words(
    session: aiohttp.ClientSession,
    path: str,
    encoding: str,
    body: bytes,
    refusal: tuple[int, str] | None,
) -> None:
    headers = {"Content-Encoding": encoding}

    async with (
        FakeNeuron(["qwen3-8b"]) as neuron,
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + path, data=body, headers=headers) as response,
    ):
        said = await response.json()

        async with session.post(gateway.url + path, data=ASK) as following:
            assert following.status == 200  # on a connection that still works

    error = said.get("error", {})
    assert (response.status, error.get("code")) == (refusal or (200, None))


async def test_headers_that_come_twice_do_no_harm(neuron: FakeNeuron) -> None:
    body = orjson.dumps({"model": "qwen3-8b", "messages": []})
    twice = b"X-Request-Id: one\r\nX-Request-Id: two\r\nAuthorization: Bearer a\r\n"
    head = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()

    async with Gateway(gateway_config(neuron)) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + twice + twice + length + body)
        answer = await reader.read()
        writer.close()

    (received,) = neuron.requests(CHAT)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert received.headers["x-request-id"] == "one"
    assert "authorization" not in received.headers
