"""Anthropic's dialect complete, with the real embedded model, which needs no wit for it."""

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from stack import MODEL, Stack

USER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME: Any = {"name": "get_time", "input_schema": {"type": "object", "properties": {}}}
CALLED: list[Any] = [
    *USER,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "A tool knows.", "signature": ""},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
            {"type": "text", "text": "Try again."},
        ],
    },
]


@pytest.fixture
def claude(stack: Stack) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=stack.url, api_key="none", max_retries=0, _strict_response_validation=True
    )


def ask(claude: anthropic.Anthropic, **fields: Any) -> Message:
    asked = {"model": MODEL, "max_tokens": 48, "messages": USER, **fields}
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    whole: Message = claude.messages.create(**asked)
    assert [b.type for b in streamed.content] == [b.type for b in whole.content]
    assert streamed.stop_reason == whole.stop_reason
    return whole


def prompt_tokens(message: Message) -> int:
    """Return the length of the prompt: Anthropic counts what was read from a cache apart."""
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_a_tool_that_is_forced_is_called_as_its_schema_says(claude: anthropic.Anthropic) -> None:
    message = ask(claude, tools=[WEATHER], tool_choice={"type": "any"})

    uses = [block for block in message.content if block.type == "tool_use"]
    assert {use.name for use in uses} == {"get_weather"}
    assert all(use.input.get("city") in ("Paris", "Rome") for use in uses)


def test_a_tool_that_is_named_is_called_once(claude: anthropic.Anthropic) -> None:
    message = ask(
        claude, tools=[TIME, WEATHER], tool_choice={"type": "tool", "name": "get_weather"}
    )

    (use,) = message.content
    assert use.type == "tool_use"
    assert (use.name, message.stop_reason) == ("get_weather", "tool_use")
    assert use.input in ({"city": "Paris"}, {"city": "Rome"})


def test_one_call_at_a_time_where_that_is_wanted(claude: anthropic.Anthropic) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}

    message = ask(claude, tools=[WEATHER], tool_choice=choice)

    assert [block.type for block in message.content] == ["tool_use"]


def test_a_format_is_kept(claude: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"title": {"enum": ["sun", "rain"]}},
        "required": ["title"],
        "additionalProperties": False,
    }

    message = ask(claude, output_config={"format": {"type": "json_schema", "schema": schema}})

    (block,) = message.content
    assert block.type == "text"
    assert json.loads(block.text) in ({"title": "sun"}, {"title": "rain"})


def test_the_assistants_last_turn_is_continued(claude: anthropic.Anthropic) -> None:
    turns = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]

    message = ask(claude, messages=turns, max_tokens=4)

    (block,) = message.content
    assert block.type == "text"
    assert block.text.startswith(" Paris")


def test_a_prompt_can_be_computed_in_advance(claude: anthropic.Anthropic) -> None:
    turns: list[Any] = [{"role": "user", "content": "Count to ten. " * 40}]

    warmed = claude.messages.create(model=MODEL, max_tokens=0, messages=turns)
    message = claude.messages.create(model=MODEL, max_tokens=1, messages=turns)

    assert (warmed.content, warmed.stop_reason, warmed.usage.output_tokens) == ([], "max_tokens", 0)
    assert prompt_tokens(warmed) == prompt_tokens(message)
    assert (message.usage.cache_read_input_tokens or 0) > 0


def test_more_tokens_than_the_context_has_room_for_are_cut(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(
        model=MODEL, max_tokens=32000, messages=USER, stop_sequences=["\n"], timeout=60
    )

    assert message.stop_reason in ("end_turn", "stop_sequence", "model_context_window_exceeded")


COUNTED: dict[str, dict[str, Any]] = {
    "a question": {},
    "a system prompt": {"system": "Be brief."},
    "system blocks": {"system": [{"type": "text", "text": text} for text in ("Be ", "brief.")]},
    "tools": {"tools": [WEATHER, {**TIME, "defer_loading": True}]},
    "tools that may not be called": {"tools": [WEATHER], "tool_choice": {"type": "none"}},
    "a named tool": {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}},
    "calls and results": {"tools": [WEATHER], "messages": CALLED},
    "a system turn": {"messages": [*USER, {"role": "system", "content": "Be brief."}]},
    "a begun answer": {"messages": [*USER, {"role": "assistant", "content": "It is"}]},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "no thinking": {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}},
}


@pytest.mark.parametrize("fields", COUNTED.values(), ids=COUNTED.keys())
def test_counting_is_exact(claude: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    asked = {"model": MODEL, "messages": USER, **fields}

    counted = claude.messages.count_tokens(**asked)
    message = claude.messages.create(**asked, max_tokens=1)

    assert counted.input_tokens == prompt_tokens(message)
