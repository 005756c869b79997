"""The official SDKs, unmodified, against the gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from cortex.gateway.app import Gateway
from cortex.gateway.config import Entitlements, Key
from cortex.ipc.errors import ContextLengthExceeded, Overloaded
from fakes import FakeModel, FakeNeuron, gateway_config

MODEL = "qwen3-8b"
USER: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "hi"}]
TURN: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
LIMITED = {**TURN, "max_tokens": 2}


@asynccontextmanager
async def openai_client(
    neuron: FakeNeuron, key: str = "placeholder", **options: Any
) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a gateway in front of *neuron*."""
    async with (
        Gateway(gateway_config(neuron, **options)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client,
    ):
        await gateway.poller.first_round()
        yield client


@asynccontextmanager
async def anthropic_client(
    neuron: FakeNeuron, key: str = "placeholder", **options: Any
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """A client of a gateway in front of *neuron*."""
    async with (
        Gateway(gateway_config(neuron, **options)) as gateway,
        anthropic.AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0) as client,
    ):
        await gateway.poller.first_round()
        yield client


async def test_openai_chat(neuron: FakeNeuron) -> None:
    async with openai_client(neuron) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=USER)

    assert answer.choices[0].message.content == "Hello world"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)


async def test_openai_chat_in_a_stream(neuron: FakeNeuron) -> None:
    neuron.keep_alives = 2

    async with openai_client(neuron) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world"
    assert chunks[-1].usage is not None


async def test_openai_text_completions(neuron: FakeNeuron) -> None:
    async with openai_client(neuron) as client:
        answer = await client.completions.create(model=MODEL, prompt="hi")
        stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])

    assert answer.choices[0].text == streamed == "Hello world"


async def test_openai_models(neuron: FakeNeuron) -> None:
    async with openai_client(neuron) as client:
        listed = [model.id async for model in client.models.list()]
        one = await client.models.retrieve(MODEL)

    assert listed == [MODEL, "smollm2-135m-instruct"]
    assert (one.id, one.object, one.owned_by) == (MODEL, "model", "cortex")


@pytest.mark.parametrize("name", ["org/model:x", "file:/srv/a model.gguf"])
async def test_both_find_a_model_by_an_id_with_slashes(neuron: FakeNeuron, name: str) -> None:
    neuron.models[name] = FakeModel(name)

    async with openai_client(neuron) as openai_side, anthropic_client(neuron) as anthropic_side:
        found = await openai_side.models.retrieve(name)
        found_too = await anthropic_side.models.retrieve(name)

    assert (found.id, found_too.id) == (name, name)


async def test_openai_errors_have_their_types(neuron: FakeNeuron) -> None:
    async with openai_client(neuron) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="x", messages=USER)
        neuron.refuses = ContextLengthExceeded.of(9, 8)
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.chat.completions.create(model=MODEL, messages=USER)

    assert (missing.value.code, too_long.value.code) == (
        "model_not_found",
        "context_length_exceeded",
    )


async def test_openai_sees_a_stream_that_breaks(neuron: FakeNeuron) -> None:
    neuron.dies_after_tokens = 1

    async with openai_client(neuron) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="broke the connection"):
            async for _ in stream:
                pass


async def test_openai_with_a_key(neuron: FakeNeuron) -> None:
    doors = Entitlements(require_auth=True, keys=(Key("sk-right-key", "laptop"),))

    async with openai_client(neuron, "sk-right-key", entitlements=doors) as client:
        assert (await client.models.retrieve(MODEL)).id == MODEL
    async with openai_client(neuron, "sk-wrong-key", entitlements=doors) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.retrieve(MODEL)


async def test_anthropic_messages(neuron: FakeNeuron) -> None:
    neuron.cached_tokens = 3

    async with anthropic_client(neuron) as client:
        message = await client.messages.create(**TURN)

    (block,) = message.content
    assert block.type == "text"
    assert (block.text, message.stop_reason) == ("Hello world", "end_turn")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (4, 3)


async def test_anthropic_messages_in_a_stream(neuron: FakeNeuron) -> None:
    neuron.keep_alives = 2
    neuron.finish_reason = "length"

    async with anthropic_client(neuron) as client, client.messages.stream(**LIMITED) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()

    assert (text, message.stop_reason) == ("Hello world", "max_tokens")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 2)


async def test_anthropic_stop_sequences(neuron: FakeNeuron) -> None:
    neuron.stop_reason = "END"

    async with anthropic_client(neuron) as client:
        message = await client.messages.create(**TURN, stop_sequences=["END"])

    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")


async def test_anthropic_counts_tokens(neuron: FakeNeuron) -> None:
    async with anthropic_client(neuron) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=TURN["messages"])

    assert counted.input_tokens == 7


async def test_anthropic_models(neuron: FakeNeuron) -> None:
    async with anthropic_client(neuron) as client:
        listed = [model.id async for model in client.models.list(limit=1)]
        one = await client.models.retrieve(MODEL)

    assert listed == [MODEL, "smollm2-135m-instruct"]
    assert (one.display_name, one.max_input_tokens) == (MODEL, 4096)


async def test_anthropic_errors_have_their_types(neuron: FakeNeuron) -> None:
    async with anthropic_client(neuron) as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**TURN, "model": "x"})
        neuron.refuses = Overloaded("full")
        with pytest.raises(anthropic.APIStatusError) as overloaded:
            await client.messages.create(**TURN)

    assert overloaded.value.status_code == 529
    assert overloaded.value.request_id


async def test_anthropic_sees_a_stream_that_breaks(neuron: FakeNeuron) -> None:
    neuron.dies_after_tokens = 1

    async with anthropic_client(neuron) as client, client.messages.stream(**TURN) as stream:
        with pytest.raises(anthropic.APIStatusError, match="broke the connection"):
            await stream.get_final_message()


async def test_anthropic_with_a_key(neuron: FakeNeuron) -> None:
    doors = Entitlements(require_auth=True, keys=(Key("sk-right-key", "laptop"),))

    async with anthropic_client(neuron, "sk-right-key", entitlements=doors) as client:
        await client.messages.create(**TURN)
    async with anthropic_client(neuron, "sk-wrong-key", entitlements=doors) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**TURN)
