"""Bytes that no client should send: the gateway answers each in its envelope, and goes on."""

import asyncio
import gzip

import msgspec
import orjson
import pytest

from bad_http import Bad, bad_http
from cortex.gateway.app import Gateway
from fakes import QUICK, FakeNeuron, gateway_config
from raw_http import Answer, Wire, head, post, wire

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
LOAD = "/fleet/models/load"
ASK = orjson.dumps({"model": "qwen3-8b", "max_tokens": 5, "messages": [{"role": "user"}]})


def port_of(gateway: Gateway) -> int:
    return int(gateway.url.rpartition(":")[2])


async def asked(connection: Wire, sent: bytes) -> Answer:
    """Send and read at once, as a body may be more than the buffers take."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(connection.send(sent))
        return await connection.answer()


@pytest.mark.parametrize("bad", bad_http(CHAT), ids=lambda bad: bad.name)
async def test_what_is_not_http_is_refused_in_the_envelope(neuron: FakeNeuron, bad: Bad) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        async with wire(port_of(gateway)) as connection:
            answer = await asked(connection, bad.sent)
            if bad.is_closed_after:
                assert await connection.closed()
            else:
                assert (await asked(connection, head("GET", "/health"))).status == 200

        assert gateway.door.inside == 0

    assert answer.refusal == bad.refusal
    assert answer.error["message"]
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"] == answer.headers["request-id"] != ""


async def test_an_encoding_that_is_not_read_is_refused_in_the_dialect(neuron: FakeNeuron) -> None:
    sent = post(MESSAGES, gzip.compress(ASK), ["Content-Encoding: br"])

    async with Gateway(gateway_config(neuron)) as gateway, wire(port_of(gateway)) as connection:
        answer = await asked(connection, sent)

    assert answer.json["type"] == "error"
    assert answer.refusal == (415, "unsupported_encoding")


async def test_an_expectation_is_refused_in_the_dialect(neuron: FakeNeuron) -> None:
    sent = post(MESSAGES, ASK, ["Expect: something"])

    async with Gateway(gateway_config(neuron)) as gateway, wire(port_of(gateway)) as connection:
        answer = await asked(connection, sent)

    assert answer.json["type"] == "error"
    assert answer.refusal == (417, "expectation_failed")


@pytest.mark.parametrize("path", [CHAT, MESSAGES, LOAD])
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_body_that_stops_coming_is_408(neuron: FakeNeuron, path: str, framing: str) -> None:
    timeouts = msgspec.structs.replace(QUICK, client_stalled_seconds=0.05)

    async with (
        Gateway(gateway_config(neuron, timeouts=timeouts)) as gateway,
        wire(port_of(gateway)) as connection,
    ):
        answer = await asked(connection, head("POST", path, framing) + b'2\r\n{"\r\n')

        assert gateway.door.inside == 0

    assert answer.refusal == (408, "request_timeout")
    assert "0.05 seconds" in answer.error["message"]


async def test_a_length_over_the_limit_is_refused_before_the_body_is_sent(
    neuron: FakeNeuron,
) -> None:
    announced = head("POST", CHAT, f"Content-Length: {2**40}")

    async with Gateway(gateway_config(neuron)) as gateway, wire(port_of(gateway)) as connection:
        answer = await asked(connection, announced)

    assert answer.refusal == (413, "body_too_large")


IDS = {
    "NUL": "%00",
    "not UTF-8": "%ff",
    "a surrogate": "%ed%a0%80",
    "lines": "a%0d%0aX-Injected:%201",
    "up": "..%2f..%2fetc%2fpasswd",
    "half a percent": "%2",
    "raw bytes": "\xff",
    "an emoji": "%f0%9f%98%80" * 100,
    "long": "x" * 7000,
}


@pytest.mark.parametrize("raw", IDS.values(), ids=IDS)
@pytest.mark.parametrize("target", ["/v1/models/{}", "/v1/messages/{}", "/fleet/{}", "/{}"])
async def test_a_path_of_any_bytes_is_404_in_words(
    neuron: FakeNeuron, target: str, raw: str
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway, wire(port_of(gateway)) as connection:
        answer = await asked(connection, head("GET", target.format(raw)))

    assert answer.status in {400, 404}
    assert answer.error["message"]
    assert "x-injected" not in answer.headers


@pytest.mark.parametrize("model", ["\0", "..", "\x1b[2J", "😀" * 100, "x" * 4000])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, LOAD])
async def test_a_body_with_an_odd_model_is_404(neuron: FakeNeuron, path: str, model: str) -> None:
    body = orjson.dumps(
        {"model": model}
        if path == LOAD
        else {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    )

    async with Gateway(gateway_config(neuron)) as gateway, wire(port_of(gateway)) as connection:
        answer = await asked(connection, post(path, body))

    assert answer.refusal == (404, "model_not_found")


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_name_that_no_model_has_is_not_repeated_for_megabytes(
    neuron: FakeNeuron, path: str
) -> None:
    body = orjson.dumps({"model": "x" * 2**20, "max_tokens": 5, "messages": []})

    async with Gateway(gateway_config(neuron)) as gateway, wire(port_of(gateway)) as connection:
        answer = await asked(connection, post(path, body))

    assert (answer.refusal, len(answer.body) < 500) == ((400, "invalid_request"), True)
