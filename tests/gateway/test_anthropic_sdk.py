"""Anthropic's SDK, unmodified and validating every answer strictly, against the gateway."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent

from anthropic_schema import faults
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from fakes import FakeNeuron, gateway_config

MODEL = "qwen3-8b"
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 99,
    "messages": [{"role": "user", "content": "What is the weather?"}],
}
CITIES = ("Paris", "Köln")


def call(index: int, city: str) -> list[dict[str, Any]]:
    """Return the deltas of a call, its arguments in pieces."""
    begin = {"index": index, "id": f"call_{index}", "type": "function"}
    pieces = ['{"ci', f'ty": "{city[:2]}', f'{city[2:]}"', "}"]
    return [
        {"tool_calls": [{**begin, "function": {"name": "get_weather", "arguments": ""}}]},
        *({"tool_calls": [{"index": index, "function": {"arguments": p}}]} for p in pieces),
    ]


@pytest.fixture
async def gateway(neuron: FakeNeuron) -> AsyncIterator[Gateway]:
    """A gateway in front of a neuron that thinks, talks and calls two tools."""
    neuron.deltas = [
        {"reasoning_content": "Two "},
        {"reasoning_content": "cities."},
        {"content": "Let me "},
        {"content": "look."},
        *call(0, CITIES[0]),
        *call(1, CITIES[1]),
    ]
    neuron.finish_reason = "tool_calls"
    neuron.cached_tokens = 3
    neuron.reasoning_tokens = 2
    async with Gateway(gateway_config(neuron)) as running:
        await running.poller.first_round()
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=gateway.url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as opened:
        yield opened


def refuse_wrong(message: Message) -> None:
    """Fail where *message* is not what was asked for, or is not in the published schema."""
    assert [block.type for block in message.content] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ]
    thinking, text, *uses = message.content
    assert thinking.type == "thinking"
    assert text.type == "text"
    assert (thinking.thinking, text.text) == ("Two cities.", "Let me look.")
    assert [use.input for use in uses if use.type == "tool_use"] == [{"city": c} for c in CITIES]
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (4, 3)
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 2
    assert faults(message.to_dict(mode="json"), "Message") == []


async def test_a_message(client: anthropic.AsyncAnthropic) -> None:
    refuse_wrong(await client.messages.create(**ASK, tools=[WEATHER]))


async def test_a_streamed_message_is_the_same(client: anthropic.AsyncAnthropic) -> None:
    async with client.messages.stream(**ASK, tools=[WEATHER]) as stream:
        kinds = [event.type async for event in stream]
        refuse_wrong(await stream.get_final_message())

    assert (kinds.count("thinking"), kinds.count("signature")) == (2, 1)
    assert (kinds.count("text"), kinds.count("input_json")) == (2, 8)


async def test_raw_events_are_valid(client: anthropic.AsyncAnthropic) -> None:
    events = await client.messages.create(**ASK, tools=[WEATHER], stream=True)

    told: list[RawMessageStreamEvent] = [event async for event in events]
    assert told[-1].type == "message_stop"


async def test_without_asyncio(gateway: Gateway) -> None:
    def ask() -> tuple[Message, Message]:
        with (
            anthropic.Anthropic(
                base_url=gateway.url, api_key="none", _strict_response_validation=True
            ) as client,
            client.messages.stream(**ASK, tools=[WEATHER]) as stream,
        ):
            return client.messages.create(**ASK, tools=[WEATHER]), stream.get_final_message()

    whole, streamed = await asyncio.to_thread(ask)

    refuse_wrong(whole)
    refuse_wrong(streamed)


async def test_the_beta_client(neuron: FakeNeuron, client: anthropic.AsyncAnthropic) -> None:
    message = await client.beta.messages.create(
        **ASK,
        tools=[WEATHER],
        betas=["interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
        thinking={"type": "enabled", "budget_tokens": 1024},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )

    assert message.stop_reason == "tool_use"
    assert neuron.received[0].body["thinking"] == {"type": "enabled", "budget_tokens": 1024}


async def test_an_answer_goes_back_as_it_came(
    neuron: FakeNeuron, client: anthropic.AsyncAnthropic
) -> None:
    first = await client.messages.create(**ASK, tools=[WEATHER])
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        for block in first.content
        if block.type == "tool_use"
    ]
    turns: list[Any] = [*ASK["messages"], first.to_param(), {"role": "user", "content": results}]

    await client.messages.create(**{**ASK, "messages": turns}, tools=[WEATHER])

    _, turn, one, two = neuron.requests("/v1/chat/completions")[1].body["messages"]
    assert (turn["reasoning_content"], turn["content"]) == ("Two cities.", "Let me look.")
    assert [c["function"]["arguments"] for c in turn["tool_calls"]] == [
        f'{{"city":"{city}"}}' for city in CITIES
    ]
    assert [(r["role"], r["tool_call_id"], r["content"]) for r in (one, two)] == [
        ("tool", "call_0", "rain"),
        ("tool", "call_1", "rain"),
    ]


@pytest.mark.parametrize("streams", [False, True])
async def test_thinking_that_is_omitted_comes_back_to_the_model(
    neuron: FakeNeuron, client: anthropic.AsyncAnthropic, streams: bool
) -> None:
    asking: dict[str, Any] = {
        **ASK,
        "tools": [WEATHER],
        "thinking": {"type": "adaptive", "display": "omitted"},
    }
    if streams:
        async with client.messages.stream(**asking) as stream:
            message: Any = await stream.get_final_message()
    else:
        message = await client.messages.create(**asking)
    results = [
        {"type": "tool_result", "tool_use_id": f"call_{index}", "content": "rain"}
        for index in range(2)
    ]
    turns = [*ASK["messages"], message.to_param(), {"role": "user", "content": results}]

    await client.messages.create(**{**asking, "messages": turns})

    assert message.content[0].thinking == ""
    turn = neuron.requests("/v1/chat/completions")[1].body["messages"][1]
    assert turn["reasoning_content"] == "Two cities."


async def test_a_forced_tool_and_one_at_a_time(
    neuron: FakeNeuron, client: anthropic.AsyncAnthropic
) -> None:
    named: Any = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}

    await client.messages.create(**ASK, tools=[WEATHER], tool_choice=named)

    body = neuron.received[0].body
    assert body["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    assert body["parallel_tool_calls"] is False


async def test_tokens_are_counted_with_the_tools(
    neuron: FakeNeuron, client: anthropic.AsyncAnthropic
) -> None:
    counted = await client.messages.count_tokens(
        model=MODEL, messages=ASK["messages"], tools=[WEATHER], system="Be brief."
    )

    assert counted.input_tokens == 7
    asked = neuron.requests("/tokenize")[0].body
    assert [turn["role"] for turn in asked["messages"]] == ["system", "user"]
    assert asked["tools"][0]["function"]["name"] == "get_weather"


async def test_a_stream_that_waits_for_a_load_is_a_message_like_any_other() -> None:
    catalogue = Catalogue({MODEL: Profile(MODEL)}, {})
    async with (
        FakeNeuron() as cold,
        Gateway(gateway_config(cold), catalogue) as gateway,
        anthropic.AsyncAnthropic(base_url=gateway.url, api_key="none", max_retries=0) as client,
    ):
        cold.may_load.clear()
        events = await client.messages.create(**ASK, stream=True)  # has got a ping, and no more
        cold.may_load.set()
        kinds = [event.type async for event in events]

    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


async def test_the_cache_is_warmed_without_an_answer(
    neuron: FakeNeuron, client: anthropic.AsyncAnthropic
) -> None:
    neuron.deltas = []
    neuron.tokens = []
    neuron.finish_reason = "length"

    message = await client.messages.create(**{**ASK, "max_tokens": 0})

    assert (message.content, message.stop_reason) == ([], "max_tokens")
    assert neuron.received[0].body["max_tokens"] == 0
