"""The fake neuron keeps its promises: what it says is in the contract of ``cortex.ipc``."""

import aiohttp
import msgspec
import pytest

from cortex.ipc.errors import Overloaded
from cortex.ipc.node_api import Health, ModelInfo
from cortex.ipc.openai_answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    EmbeddingList,
)
from fakes import FakeNeuron, until

CHAT = "/v1/chat/completions"
STREAM = {"model": "qwen3-8b", "messages": [], "stream": True}


async def post(neuron: FakeNeuron, path: str, **body: object) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{neuron.url}{path}", json={"model": "qwen3-8b", **body}) as response,
    ):
        return response.status, await response.text()


async def get(neuron: FakeNeuron, path: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(neuron.url + path) as response:
        return await response.read()


async def test_its_chunks_are_in_the_contract(neuron: FakeNeuron) -> None:
    neuron.tokens = ["a", "b"]

    _, text = await post(neuron, CHAT, stream=True)

    *events, done, rest = text.split("\n\n")
    chunks = [
        msgspec.json.decode(event.removeprefix("data: "), type=ChatCompletionChunk)
        for event in events
    ]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "a", "b", None]
    assert (done, rest) == ("data: [DONE]", "")


async def test_its_answers_are_in_the_contract(neuron: FakeNeuron) -> None:
    _, chat = await post(neuron, CHAT)
    _, text = await post(neuron, "/v1/completions")
    _, vectors = await post(neuron, "/v1/embeddings")

    assert msgspec.json.decode(vectors, type=EmbeddingList).data[0].embedding == [0.6, 0.8]
    assert msgspec.json.decode(chat, type=ChatCompletion).choices[0].message.content
    assert msgspec.json.decode(text, type=Completion).choices[0].text == "Hello world"


async def test_its_health_and_models_are_in_the_contract(neuron: FakeNeuron) -> None:
    health = msgspec.json.decode(await get(neuron, "/health"), type=Health)
    models = msgspec.json.decode(await get(neuron, "/models"), type=list[ModelInfo])

    assert [load.id for load in health.models] == [model.id for model in models] == ["qwen3-8b"]


async def test_it_tells_usage_to_those_who_ask(neuron: FakeNeuron) -> None:
    async with (
        aiohttp.ClientSession(headers={"x-cortex-usage": "1"}) as session,
        session.post(neuron.url + CHAT, json=STREAM) as response,
    ):
        text = await response.text()

    assert '\n\n: usage {"prompt_tokens":7,' in text


async def test_it_can_die_in_the_middle_of_a_stream(neuron: FakeNeuron) -> None:
    neuron.dies_after_tokens = 1

    with pytest.raises(aiohttp.ClientPayloadError):
        await post(neuron, CHAT, stream=True)


async def test_it_can_break_before_it_answers(neuron: FakeNeuron) -> None:
    neuron.breaks = True

    with pytest.raises(aiohttp.ClientConnectionError):
        await post(neuron, CHAT)


async def test_it_refuses_as_it_was_told(neuron: FakeNeuron) -> None:
    neuron.refuses = Overloaded("the queue is full", retry_after_seconds=3)

    status, text = await post(neuron, CHAT)

    assert (status, "the queue is full" in text) == (503, True)


async def test_a_load_waits_for_its_gate(neuron: FakeNeuron) -> None:
    neuron.may_load.clear()
    await post(neuron, "/models/load", model_id="x")

    before = msgspec.json.decode(await get(neuron, "/models"), type=list[ModelInfo])
    neuron.may_load.set()
    after = msgspec.json.decode(await get(neuron, "/models"), type=list[ModelInfo])

    assert [before[1].status, after[1].status] == ["loading", "loaded"]


async def test_it_notices_that_a_client_has_gone(neuron: FakeNeuron) -> None:
    neuron.may_finish.clear()

    async with aiohttp.ClientSession() as session:
        response = await session.post(neuron.url + CHAT, json=STREAM)
        response.close()

    await until(neuron.cancelled.is_set)


async def test_it_says_reasoning_and_calls_alike_in_a_stream_and_whole(neuron: FakeNeuron) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    neuron.deltas = [
        {"reasoning_content": "Hm"},
        {"content": "Hi"},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ]

    _, text = await post(neuron, CHAT, messages=[])
    _, streamed = await post(neuron, CHAT, messages=[], stream=True)

    whole = msgspec.json.decode(text)["choices"][0]["message"]
    assert (whole["reasoning_content"], whole["content"]) == ("Hm", "Hi")
    assert whole["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert all(f'"delta":{msgspec.json.encode(d).decode()}' in streamed for d in neuron.deltas)
