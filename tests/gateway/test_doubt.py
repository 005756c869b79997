"""What a node says to a request is believed before the next poll is due."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest

from cortex.gateway.app import Gateway
from cortex.ipc.errors import (
    ApiError,
    ModelLoading,
    ModelNotFound,
    NodeFailed,
    Overloaded,
    Recovering,
)
from cortex.ipc.node_api import Servable
from fakes import QUICK, FakeModel, FakeNeuron, gateway_config

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASK: dict[str, Any] = {
    "model": "qwen3-8b",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
RARELY = msgspec.structs.replace(QUICK, poll_seconds=3600)


@pytest.fixture
async def gateway(neuron: FakeNeuron) -> AsyncIterator[Gateway]:
    """A gateway that has polled once and would not poll again for an hour."""
    async with Gateway(gateway_config(neuron, timeouts=RARELY)) as serving:
        await serving.poller.first_round()
        yield serving


async def is_listed_as_loaded(session: aiohttp.ClientSession, gateway: Gateway) -> bool:
    async with session.get(gateway.url + "/v1/models") as response:
        found = (await response.json())["data"]
    return any(entry["id"] == "qwen3-8b" and entry["loaded"] for entry in found)


def recovers(neuron: FakeNeuron) -> None:
    model = neuron.models["qwen3-8b"]
    model.status, model.servable = "recovering", Servable(ok=False, reason="recovering")


@pytest.mark.parametrize("refusal", [Recovering, NodeFailed], ids=lambda kind: str(kind.code))
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_refusal_is_believed_at_once(
    neuron: FakeNeuron,
    gateway: Gateway,
    session: aiohttp.ClientSession,
    refusal: type[ApiError],
    stream: bool,
) -> None:
    neuron.refuses = refusal("the device restarts")
    recovers(neuron)

    async with session.post(gateway.url + CHAT, json={**ASK, "stream": stream}) as response:
        assert response.status == refusal.status

    assert not await is_listed_as_loaded(session, gateway)


async def test_a_model_that_is_gone_is_believed_to_be_gone(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    neuron.models.clear()

    async with session.post(gateway.url + CHAT, json=ASK) as response:
        assert response.status == ModelNotFound.status

    assert not await is_listed_as_loaded(session, gateway)


async def test_a_model_that_is_loaded_again_is_waited_for(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    neuron.refuses = ModelLoading("on its way")
    neuron.models["qwen3-8b"].status = "loading"
    neuron.may_load.clear()

    async with session.post(gateway.url + CHAT, json={**ASK, "stream": True}) as response:
        waiting = await response.content.readuntil(b"\n\n")
        neuron.refuses = None
        neuron.may_load.set()
        text = await response.text()

    assert waiting.startswith(b": loading qwen3-8b on a")
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("how", ["fails_after_tokens", "dies_after_tokens"])
async def test_a_stream_that_fails_is_believed_before_it_is_told(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession, path: str, how: str
) -> None:
    setattr(neuron, how, 1)
    recovers(neuron)

    async with session.post(gateway.url + path, json={**ASK, "stream": True}) as response:
        async for line in response.content:
            if b'"error"' in line:
                break
        else:
            pytest.fail("the stream tells no error")
        assert not await is_listed_as_loaded(session, gateway)


async def test_a_model_that_has_just_come_back_is_not_refused(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    recovers(neuron)
    await gateway.poller.refresh("a")
    neuron.models["qwen3-8b"] = FakeModel("qwen3-8b")

    async with session.post(gateway.url + CHAT, json=ASK) as response:
        assert response.status == 200


async def test_a_model_that_has_not_come_back_is_refused(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    recovers(neuron)
    await gateway.poller.refresh("a")

    async with session.post(gateway.url + CHAT, json=ASK) as response:
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (503, "recovering")
    assert neuron.requests(CHAT) == []


async def test_a_full_queue_is_no_reason_to_ask_again(
    neuron: FakeNeuron, gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    neuron.refuses = Overloaded("full")
    recovers(neuron)

    async with session.post(gateway.url + CHAT, json=ASK) as response:
        assert response.status == 503

    assert await is_listed_as_loaded(session, gateway)
