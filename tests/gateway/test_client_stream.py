"""A client that cannot be written to any more has gone, whatever the transport says."""

from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cortex.gateway.app import Gateway
from cortex.ipc.response_body import ResponseBody
from fakes import FakeNeuron, gateway_config, until

STREAM = {"model": "qwen3-8b", "messages": [], "stream": True}


async def line_of_a_request_whose_writes_fail(
    word: bytes,
    neuron: FakeNeuron,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the canonical line where the gateway cannot write anything with *word* in it."""
    original, at_once = web.StreamResponse.write, ResponseBody.write_at_once

    def write_at_once(body: ResponseBody, data: bytes) -> bool:
        return word not in data and at_once(body, data)

    async def write(response: web.StreamResponse, data: bytes) -> None:
        if word in data and response.headers.get("x-cortex-node"):
            raise ConnectionResetError
        await original(response, data)

    monkeypatch.setattr(ResponseBody, "write_at_once", write_at_once)
    monkeypatch.setattr(web.StreamResponse, "write", write)
    async with Gateway(gateway_config(neuron)) as gateway, aiohttp.ClientSession() as session:
        response = await session.post(gateway.url + "/v1/chat/completions", json=STREAM)
        await until(lambda: any(entry["event"] == "request finished" for entry in logged))
        response.close()
    return next(entry for entry in logged if entry["event"] == "request finished")


async def test_a_write_that_fails_ends_the_request_as_gone(
    neuron: FakeNeuron, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    line = await line_of_a_request_whose_writes_fail(b"data", neuron, monkeypatch, logged)

    assert (line["status"], line["code"]) == (499, "client_gone")


async def test_an_error_frame_that_cannot_be_written_keeps_the_cause(
    neuron: FakeNeuron, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    neuron.dies_after_tokens = 1

    line = await line_of_a_request_whose_writes_fail(b'"error"', neuron, monkeypatch, logged)

    assert (line["status"], line["code"]) == (502, "node_failed")
