"""Answers that keep to a grammar: the SDK, the stack, the real model, hot and with many seeds."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from stack import MODEL, Stack

QUESTION = [{"role": "user", "content": "Describe a person, and what the weather is like."}]
HOT: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 1.5}


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    mood: Literal["good", "bad"] | None


class Look(BaseModel):
    """Look at something."""

    what: str = Field(max_length=12)
    times: int = Field(ge=1, le=9)


LOOK = openai.pydantic_function_tool(Look)
WAIT = {"type": "function", "function": {"name": "wait", "description": "Do nothing."}}

SCHEMAS: dict[str, dict[str, Any]] = {
    "numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "enum": {"enum": ["red", "green", 3, None]},
    "nested": {
        "$ref": "#/$defs/Tree",
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {
                    "leaf": {"type": "boolean"},
                    "below": {"type": "array", "items": {"$ref": "#/$defs/Leaf"}, "maxItems": 2},
                },
                "required": ["leaf", "below"],
                "additionalProperties": False,
            },
            "Leaf": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        },
    },
}


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: openai.OpenAI, **more: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(**{**HOT, "max_tokens": 300, **more})
    return answer


def contents(answer: ChatCompletion) -> list[str]:
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    return [choice.message.content or "" for choice in answer.choices]


def is_valid(value: Any, name: str) -> bool:
    """Whether *value* keeps to the schema of that name, in Python's own words."""
    match name:
        case "numbers":
            return 2 <= len(value) <= 4 and all(type(item) is int for item in value)
        case "enum":
            return value in ("red", "green", 3, None)
        case _:
            return (
                list(value) == ["leaf", "below"]
                and isinstance(value["leaf"], bool)
                and len(value["below"]) <= 2
                and all(re.fullmatch("[a-z]{1,5}", item) for item in value["below"])
            )


@pytest.mark.parametrize("name", SCHEMAS)
def test_hot_answers_are_json_of_the_schema(client: openai.OpenAI, name: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name]}}

    for text in contents(ask(client, n=4, seed=5, response_format=schema)):
        assert is_valid(json.loads(text), name), text


def test_the_sdk_parses_hot_answers_and_streams_them_equally(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**HOT, "max_tokens": 300, "seed": 3, "response_format": Person}

    parsed = client.chat.completions.parse(**options)
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion()

    assert isinstance(parsed.choices[0].message.parsed, Person)
    assert streamed.choices[0].message.content == parsed.choices[0].message.content


@pytest.mark.parametrize(
    ("demand", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{2,8}, \d{1,3}"}, r"[A-Z][a-z]{2,8}, \d{1,3}"),
        ({"choice": ["sunny", "rainy", "sunny and rainy"]}, "sunny|rainy|sunny and rainy"),
        ({"grammar": 'start: "<" N ("-" N)~1..3 ">"\nN: /[0-9]/'}, r"<\d(-\d){1,3}>"),
    ],
)
def test_hot_answers_match_what_is_demanded(
    client: openai.OpenAI, demand: dict[str, Any], pattern: str
) -> None:
    answer = ask(client, n=4, seed=9, extra_body={"structured_outputs": demand})

    for text in contents(answer):
        assert re.fullmatch(pattern, text), text


def test_a_completion_is_any_json_object(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="A point as JSON:",
        max_tokens=400,
        temperature=0,
        extra_body={"structured_outputs": {"json": SCHEMAS["nested"]}},
    )

    assert is_valid(json.loads(answer.choices[0].text), "nested")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Look"}}])
def test_calls_that_are_demanded_keep_to_their_schemas(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(
        client, n=3, seed=4, tools=[LOOK, WAIT], tool_choice=choice, parallel_tool_calls=False
    )

    for made in answer.choices:
        assert (made.finish_reason, made.message.content or "") == ("tool_calls", "")
        [call] = made.message.tool_calls or []
        assert call.type == "function"
        if choice != "required" or call.function.name == "Look":
            assert call.function.name == "Look"
            Look.model_validate_json(call.function.arguments)
        else:
            assert (call.function.name, call.function.arguments) == ("wait", "{}")


def test_the_sdk_streams_a_demanded_call_into_a_type(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        **HOT,
        seed=2,
        max_tokens=200,
        tools=[LOOK],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        answer = stream.get_final_completion()

    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Look)


def test_beside_a_strict_tool_the_model_may_just_answer(client: openai.OpenAI) -> None:
    answer = ask(client, n=4, seed=1, max_tokens=60, tools=[LOOK])

    for choice in answer.choices:
        assert choice.message.content or choice.message.tool_calls
        for call in choice.message.tool_calls or []:
            assert call.type == "function"
            if choice.finish_reason == "tool_calls":
                Look.model_validate_json(call.function.arguments)


def test_an_answer_that_is_cut_says_length(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=2, extra_body={"structured_outputs": {"regex": "[0-9]{40}"}})

    assert answer.choices[0].finish_reason == "length"
    assert (answer.choices[0].message.content or "").isdigit()


def test_a_stop_string_ends_an_answer_within_its_grammar(client: openai.OpenAI) -> None:
    answer = ask(
        client, stop=":", temperature=0, extra_body={"structured_outputs": {"regex": "a:b"}}
    )

    assert contents(answer) == ["a"]


def test_without_an_end_an_answer_ends_where_nothing_can_follow(client: openai.OpenAI) -> None:
    more = {"ignore_eos": True, "structured_outputs": {"regex": "(ab){3}"}}

    assert contents(ask(client, extra_body=more)) == ["ababab"]


def test_log_probabilities_come_with_the_tokens_that_were_allowed(client: openai.OpenAI) -> None:
    more = {"structured_outputs": {"choice": ["quixotic"]}}
    choice = ask(client, logprobs=True, top_logprobs=2, extra_body=more).choices[0]

    assert choice.logprobs is not None
    assert "".join(token.token for token in choice.logprobs.content or []) == "quixotic"


def test_a_grammar_answer_is_the_same_beside_others(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"response_format": {"type": "json_object"}, "max_tokens": 24}

    together = ask(client, n=3, seed=21, **options)
    alone = [ask(client, seed=21 + at, **options) for at in range(3)]

    assert [c.message.content for c in together.choices] == [
        answer.choices[0].message.content for answer in alone
    ]


def test_a_schema_that_cannot_be_enforced_is_refused_by_its_place(client: openai.OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refusal:
        ask(client, response_format=form)

    assert refusal.value.param == "response_format.json_schema.schema"
