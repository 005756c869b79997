"""OpenAI's SDK, unmodified and validating strictly, against the gateway's Responses."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseReasoningItem
from pydantic import BaseModel

from cortex.gateway.app import Gateway
from cortex.ipc.errors import ContextLengthExceeded
from fakes import FakeNeuron, gateway_config

MODEL = "qwen3-8b"
LS: Any = {
    "type": "function",
    "name": "ls",
    "description": "Lists.",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    "strict": True,
}
CALL: list[dict[str, Any]] = [
    {"reasoning_content": "Files?"},
    {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "ls", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
]


@asynccontextmanager
async def client_of(neuron: FakeNeuron) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a gateway in front of *neuron*."""
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1",
            api_key="placeholder",
            max_retries=0,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


async def test_a_response(neuron: FakeNeuron) -> None:
    async with client_of(neuron) as client:
        response = await client.responses.create(model=MODEL, input="hi")

    assert (response.output_text, response.status) == ("Hello world", "completed")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (7, 2)


async def test_a_stream(neuron: FakeNeuron) -> None:
    neuron.keep_alives = 2

    async with (
        client_of(neuron) as client,
        client.responses.stream(model=MODEL, input="hi") as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()

    assert final.output_text == "Hello world"
    assert kinds.count("response.output_text.delta") == 2


async def test_a_plain_stream_of_events(neuron: FakeNeuron) -> None:
    neuron.deltas = CALL

    async with client_of(neuron) as client:
        stream = await client.responses.create(
            model=MODEL, input="hi", tools=[LS], stream=True, reasoning={"summary": "auto"}
        )
        events = [event async for event in stream]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "response.reasoning_summary_text.delta" in [event.type for event in events]


@pytest.mark.parametrize("streams", [False, True])
async def test_a_tool_loop(neuron: FakeNeuron, streams: bool) -> None:
    async with client_of(neuron) as client:

        async def ask(items: Any) -> Any:
            if not streams:
                return await client.responses.create(model=MODEL, input=items, tools=[LS])
            async with client.responses.stream(model=MODEL, input=items, tools=[LS]) as stream:
                return await stream.get_final_response()

        items: Any = [{"role": "user", "content": "List the files."}]
        neuron.deltas = CALL
        first = await ask(items)
        reasoning, call = first.output
        items += [
            {k: v for k, v in item.to_dict().items() if k != "parsed_arguments"}
            for item in first.output
        ]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "a.txt"})
        neuron.deltas = []
        last = await ask(items)

    assert isinstance(reasoning, ResponseReasoningItem)
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.arguments) == ("ls", "{}")
    assert last.output_text == "Hello world"
    turn, result = neuron.received[-1].body["messages"][1:]
    assert turn["reasoning_content"] == "Files?"
    assert turn["tool_calls"][0]["id"] == result["tool_call_id"] == "call_1"


class City(BaseModel):
    """What is asked for."""

    name: str


async def test_an_answer_is_parsed(neuron: FakeNeuron) -> None:
    neuron.tokens = ['{"name":', '"Paris"}']

    async with client_of(neuron) as client:
        response = await client.responses.parse(model=MODEL, input="hi", text_format=City)
        async with client.responses.stream(model=MODEL, input="hi", text_format=City) as stream:
            streamed = await stream.get_final_response()

    assert response.output_parsed == streamed.output_parsed == City(name="Paris")
    asked = neuron.received[0].body["response_format"]
    assert (asked["json_schema"]["name"], asked["json_schema"]["strict"]) == ("City", True)


async def test_a_conversation(neuron: FakeNeuron) -> None:
    async with client_of(neuron) as client:
        first = await client.responses.create(model=MODEL, input="hi")
        await client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
        shown = await client.responses.retrieve(first.id)
        listed = [item.id async for item in client.responses.input_items.list(first.id, limit=1)]
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="dropped"):
            await client.responses.create(model=MODEL, input="x", previous_response_id=first.id)

    assert shown == first
    assert len(listed) == 1
    assert [m["content"] for m in neuron.received[1].body["messages"]] == [
        "hi",
        "Hello world",
        "And?",
    ]


async def test_errors_have_their_types(neuron: FakeNeuron) -> None:
    async with client_of(neuron) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.create(model="x", input="hi")
        with pytest.raises(openai.BadRequestError) as unsupported:
            await client.responses.create(model=MODEL, input="hi", background=True)
        neuron.refuses = ContextLengthExceeded.of(9, 8)
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.responses.create(model=MODEL, input="hi")

    assert missing.value.code == "model_not_found"
    assert (unsupported.value.code, unsupported.value.param) == (
        "unsupported_parameter",
        "background",
    )
    assert too_long.value.code == "context_length_exceeded"


async def test_the_tokens_of_a_prompt_are_counted(neuron: FakeNeuron) -> None:
    async with client_of(neuron) as client:
        counted = await client.responses.input_tokens.count(model=MODEL, input="hi", tools=[LS])

    assert (counted.object, counted.input_tokens) == ("response.input_tokens", 7)
