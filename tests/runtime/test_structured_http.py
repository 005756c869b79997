"""Structured output over HTTP: what reaches the device, what is refused before, and the SDK."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from cortex.ipc.errors import GrammarFailed
from cortex.runtime.chat import Chat, ChatOptions
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.served_model import Limits
from cortex.runtime.text import TextSide
from fake_node import CHATML, FakeNode, Step, posting, says, serving, tiny_text
from tiny_grammar import ByteVocabulary, reads

BYTES = ByteVocabulary()
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
LOOK = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string"}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": LOOK}
STRICT = {"type": "function", "function": {**LOOK, "strict": True}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "the fox"}}\n</tool_call>'


def text_side(template: str = CHATML) -> TextSide:
    """Return a small real text side that writes calls as hermes does."""
    side = tiny_text()
    chat = Chat(
        side.tokenizer,
        ChatTemplate(template, side.tokenizer.special_tokens),
        ChatOptions(tool_prompt="hermes"),
    )
    return dataclasses.replace(side, chat=chat)


def node_that(script: Sequence[Step], template: str = CHATML) -> FakeNode:
    node = FakeNode("m")
    node.models["m"].text = text_side(template)
    node.models["m"].limits = Limits(4096, 8, 8192)
    node.script = script
    return node


async def posted(node: FakeNode, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the status and the answer of one request."""
    async with posting(node, path, body) as response:
        return response.status, json.loads(await response.read())


async def grammar_of(body: dict[str, Any], path: str = "/v1/chat/completions", **more: Any) -> str:
    """Return the grammar that the device is asked to keep to, "" for none."""
    node = node_that(says("Yes."), **more)
    status, answer = await posted(node, path, body)
    assert status == 200, answer
    return node.asked[0][2].grammar or ""


async def test_a_request_that_demands_nothing_has_no_grammar() -> None:
    assert await grammar_of({**ASK, "tools": [TOOL]}) == ""
    assert await grammar_of({**ASK, "response_format": {"type": "text"}}) == ""
    assert await grammar_of({**ASK, "tools": [STRICT], "tool_choice": "none"}) == ""


@pytest.mark.parametrize(
    ("more", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, "{}", "Yes."),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "a", "c"),
        ({"tools": [TOOL], "tool_choice": "required"}, f"{CALL}\n{CALL}", "Yes."),
        (
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            CALL,
            CALL + CALL,
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
            CALL,
            CALL + CALL,
        ),
        ({"tools": [STRICT]}, f"I look.{CALL}", CALL.replace('"at"', '"to"')),
        ({"tools": [TOOL], "structured_outputs": {"regex": "[0-9]+"}}, "42", "Yes."),
        ({"tools": [TOOL], "structured_outputs": {"regex": "[0-9]+"}}, CALL, "Yes."),
    ],
)
async def test_what_a_chat_demands_reaches_the_device_as_a_grammar(
    more: dict[str, Any], good: str, bad: str
) -> None:
    grammar = await grammar_of({**ASK, **more})

    assert reads(grammar, good, BYTES)
    assert not reads(grammar, bad, BYTES)


async def test_a_completion_demands_a_text_too() -> None:
    body = {"model": "m", "prompt": "x", "structured_outputs": {"regex": "[0-9]+"}}

    grammar = await grammar_of(body, "/v1/completions")

    assert reads(grammar, "42", BYTES)
    assert not reads(grammar, "x", BYTES)


THINKS = CHATML + "{# <think> </think> #}"


@pytest.mark.parametrize(
    ("template", "good", "bad"),
    [
        (THINKS, "<think>Hm.</think>\n\n42", "<think>Hm.</think>Yes."),
        (THINKS, "42", "Hm.</think>42"),
        (THINKS + "<think>\n", "Hm.</think>42", "42"),
        (THINKS + "<think>\n\n</think>\n\n", "42", "<think>Hm.</think>42"),
    ],
)
async def test_a_grammar_begins_behind_the_reasoning(template: str, good: str, bad: str) -> None:
    body = {**ASK, "structured_outputs": {"regex": "[0-9]+"}}

    grammar = await grammar_of(body, template=template)

    assert reads(grammar, good, BYTES)
    assert not reads(grammar, bad, BYTES)


BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "strin"}}}
UNSUPPORTED = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("more", "place"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}},
            "response_format.json_schema.schema",
        )
        for s in (BAD_SCHEMA, UNSUPPORTED)
    ]
    + [
        ({"structured_outputs": {"json": UNSUPPORTED}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        (
            {
                "tools": [
                    TOOL,
                    {"function": {"name": "f", "parameters": BAD_SCHEMA, "strict": True}},
                ]
            },
            "tools[1].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": UNSUPPORTED}}]}
            | {"tool_choice": "required"},
            "tools[0].function.parameters",
        ),
    ],
)
async def test_what_cannot_be_enforced_is_refused_before_the_device_is_asked(
    more: dict[str, Any], place: str
) -> None:
    node = node_that(says("Yes."))

    status, answer = await posted(node, "/v1/chat/completions", {**ASK, **more})

    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "invalid_request", place)
    assert error["message"]
    assert node.asked == []


async def test_a_schema_of_a_tool_that_may_be_called_as_it_likes_is_nobodys_business() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": UNSUPPORTED}}]

    assert await grammar_of({**ASK, "tools": tools}) == ""


# The official SDK, with the types of pydantic


class Person(BaseModel):
    """Whom the model is asked for."""

    name: str
    age: int
    mood: Literal["good", "bad"]


class Look(BaseModel):
    """Look somewhere."""

    at: str


@asynccontextmanager
async def sdk(node: FakeNode) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(node) as server,
        openai.AsyncOpenAI(
            base_url=str(server.make_url("/v1")), api_key="none", max_retries=0
        ) as client,
    ):
        yield client


BO = '{"name": "Bo", "age": 3, "mood": "good"}'


async def test_the_sdk_parses_an_answer_into_a_type() -> None:
    node = node_that(says(BO))

    async with sdk(node) as client:
        answer = await client.chat.completions.parse(**ASK, response_format=Person)

    assert answer.choices[0].message.parsed == Person(name="Bo", age=3, mood="good")
    grammar = node.asked[0][2].grammar
    assert grammar is not None
    assert reads(grammar, BO, BYTES)
    assert not reads(grammar, BO.replace("good", "fine"), BYTES)


async def test_the_sdk_streams_an_answer_into_a_type() -> None:
    async with (
        sdk(node_that(says(BO))) as client,
        client.chat.completions.stream(**ASK, response_format=Person) as stream,
    ):
        answer = await stream.get_final_completion()

    assert answer.choices[0].message.parsed == Person(name="Bo", age=3, mood="good")


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_the_sdk_streams_a_call_into_a_type(choice: Any) -> None:
    call = CALL.replace('"look"', '"Look"')
    node = node_that(says(call))

    async with (
        sdk(node) as client,
        client.chat.completions.stream(
            **ASK, tools=[openai.pydantic_function_tool(Look)], tool_choice=choice
        ) as stream,
    ):
        answer = await stream.get_final_completion()

    [made] = answer.choices[0].message.tool_calls or []
    assert made.function.parsed_arguments == Look(at="the fox")
    assert json.loads(made.function.arguments) == {"at": "the fox"}
    grammar = node.asked[0][2].grammar
    assert grammar is not None
    assert reads(grammar, call, BYTES)
    assert not reads(grammar, call.replace('"at"', '"to"'), BYTES)


async def test_a_type_beside_tools_is_an_answer_or_a_call() -> None:
    node = node_that(says(BO))

    async with sdk(node) as client:
        answer = await client.chat.completions.parse(
            **ASK, response_format=Person, tools=[openai.pydantic_function_tool(Look)]
        )

    assert answer.choices[0].message.parsed == Person(name="Bo", age=3, mood="good")
    grammar = node.asked[0][2].grammar
    assert grammar is not None
    assert reads(grammar, CALL.replace('"look"', '"Look"'), BYTES)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_grammar_that_fails_on_the_device_is_the_requests_fault(is_streamed: bool) -> None:
    body = {**ASK, "structured_outputs": {"choice": ["a"]}, "stream": is_streamed}
    async with posting(
        node_that([GrammarFailed("lexer error")]), "/v1/chat/completions", body
    ) as response:
        status, raw = response.status, await response.text()

    assert status == (200 if is_streamed else 400)
    frame = raw.strip().rsplit("data: ", 1)[-1]
    error = json.loads(frame)["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "structured_outputs.choice")


async def test_a_grammar_that_would_fail_on_the_device_is_refused_before() -> None:
    node = node_that(says("Yes."))
    body = {**ASK, "structured_outputs": {"regex": "(a{1000}){1000}"}}
    status, answer = await posted(node, "/v1/chat/completions", body)

    assert status == 400
    assert "too many expressions" in answer["error"]["message"]
    assert answer["error"]["param"] == "structured_outputs.regex"
    assert node.asked == []
