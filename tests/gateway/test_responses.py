"""A Responses request, as the node's chat request."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson
import pytest

from cortex.gateway.dialects.responses import ResponsesCall, decode_responses
from cortex.ipc.errors import (
    ApiError,
    BodyTooLarge,
    InvalidRequest,
    MalformedJson,
    MissingModelField,
    PreviousResponseNotFound,
    UnsupportedParameter,
)
from cortex.ipc.node_api import MAX_BODY_BYTES

ASK: dict[str, Any] = {"model": "m", "input": "hi"}
HI = {"role": "user", "content": "hi"}
RESULT = {"type": "function_call_output", "call_id": "c1"}
LS = {"type": "function", "name": "ls"}


@dataclass
class FakeMemory:
    """Knows one response, ``resp_1``, and one item, ``msg_1``; remembers what it is given."""

    kept: list[tuple[dict[str, Any], Any]] = field(default_factory=list)

    def conversation(self, last: str) -> list[dict[str, Any]]:
        if last != "resp_1":
            raise PreviousResponseNotFound(last)
        return [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]

    def item(self, item_id: str, place: str) -> dict[str, Any]:
        if item_id != "msg_1":
            raise InvalidRequest(place, param=place)
        return {"type": "message", "id": "msg_1", "role": "assistant", "content": "before"}

    def keep(self, response: dict[str, Any], items: msgspec.Raw) -> None:
        self.kept.append((response, msgspec.json.decode(items)))


def call(*, stores: bool = True, **said: Any) -> ResponsesCall:
    return decode_responses(msgspec.json.encode({**ASK, **said}), FakeMemory(), stores=stores)


def chat(**said: Any) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(call(**said).body("m"))
    return body


def messages(**said: Any) -> Any:
    return chat(**said)["messages"]


def refused(said: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(**said)
    return caught.value


def test_the_least_that_can_be_asked() -> None:
    assert chat() == {"model": "m", "stream": False, "messages": [HI]}


def test_the_node_gets_its_own_name_of_the_model() -> None:
    assert orjson.loads(call().body("org/m"))["model"] == "org/m"


def test_a_stream_is_asked_to_tell_what_it_has_cost() -> None:
    body = chat(stream=True)

    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_instructions_come_first() -> None:
    found = messages(instructions="Be terse.", input=[{"role": "developer", "content": "Now."}])

    assert found == [
        {"role": "system", "content": "Be terse."},
        {"role": "developer", "content": "Now."},
    ]


def test_a_conversation_goes_on_where_it_was() -> None:
    assert messages(previous_response_id="resp_1") == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        HI,
    ]


def test_nothing_new_need_be_said_to_go_on() -> None:
    body = orjson.dumps({"model": "m", "previous_response_id": "resp_1"})

    asked = decode_responses(body, FakeMemory(), stores=True)
    assert len(orjson.loads(asked.body("m"))["messages"]) == 2


def test_an_item_may_be_a_reference_to_a_stored_one() -> None:
    reference = {"type": "item_reference", "id": "msg_1"}

    assert messages(input=[reference, HI])[0] == {"role": "assistant", "content": "before"}


def test_a_call_that_was_cut_is_no_end_of_the_conversation() -> None:
    cut = {"type": "function_call", "call_id": "c1", "name": "ls", "status": "incomplete"}
    whole = {**cut, "arguments": '{"a":1}'}

    assert messages(input=[HI, {**cut, "arguments": '{"a":'}, HI]) == [HI, HI]
    assert len(messages(input=[HI, whole, HI])) == 3


def test_an_item_is_referred_to_once() -> None:
    reference = {"type": "item_reference", "id": "msg_1"}

    error = refused({"input": [reference, HI, reference]})

    assert (error.code, error.param) == ("invalid_request", "input[2].id")


def test_a_message_whose_type_is_null_is_one() -> None:
    assert messages(input=[{**HI, "type": None}]) == [HI]


def test_a_conversation_that_no_node_would_take_is_refused() -> None:
    class Full(FakeMemory):
        def conversation(self, last: str) -> list[dict[str, Any]]:
            del last
            return [{"role": "user", "content": "x" * MAX_BODY_BYTES}]

    body = msgspec.json.encode({**ASK, "previous_response_id": "resp_1"})

    with pytest.raises(BodyTooLarge):
        decode_responses(body, Full(), stores=True)


def test_nulls_among_the_items_are_nothing() -> None:
    assert messages(input=[None, HI]) == [HI]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"max_output_tokens": 9}, {"max_completion_tokens": 9}),
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0.0, "top_p": 0.5}),
        (
            {"top_k": 3, "min_p": 0.1, "seed": 7, "stop": ["x"]},
            {"top_k": 3, "min_p": 0.1, "seed": 7, "stop": ["x"]},
        ),
        ({"presence_penalty": 1, "frequency_penalty": 1}, {"presence_penalty": 1.0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"a": 1}}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        (
            {"text": {"format": {"type": "json_object"}, "verbosity": "medium"}},
            {"response_format": {"type": "json_object"}},
        ),
        (
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "n",
                        "schema": {},
                        "strict": True,
                        "description": "d",
                    }
                }
            },
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {}, "strict": True, "description": "d"},
                }
            },
        ),
        ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        (
            {"tools": [LS], "tool_choice": "auto", "parallel_tool_calls": False},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
    ],
)
def test_a_parameter_is_chats(said: dict[str, Any], expected: dict[str, Any]) -> None:
    body = chat(**said)

    assert {name: body[name] for name in expected} == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_number_may_be_of_any_size(stream: bool) -> None:
    huge = {**LS, "parameters": {"maximum": 2**256}}
    asked = call(tools=[huge], stream=stream, input=[{**RESULT, "output": {"n": 2**256}}])

    for told in (asked.body("m"), asked.answer("m", completion()), asked.keep_alive("x")):
        assert str(2**256).encode() in told


def test_a_choice_among_no_tools_is_none() -> None:
    body = chat(tools=[{"type": "web_search"}], tool_choice="auto", parallel_tool_calls=True)

    assert body.keys() == {"model", "stream", "messages"}


@pytest.mark.parametrize(
    "said",
    [
        {"background": False},
        {"client_metadata": {"x": "y"}},
        {"context_management": None},
        {"conversation": None},
        {"include": ["reasoning.encrypted_content"]},
        {"max_tool_calls": 3},
        {"metadata": {"a": "b"}},
        {"moderation": None},
        {"prompt": None},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h"},
        {"prompt_cache_options": {"mode": "implicit"}},
        {"reasoning": None, "text": None, "instructions": None, "previous_response_id": None},
        {"reasoning": {"context": None}},
        {"safety_identifier": "s", "user": "u"},
        {"service_tier": "flex"},
        {"store": False},
        {"stream_options": {"include_obfuscation": True}},
        {"truncation": "disabled"},
    ],
)
def test_what_cannot_change_the_tokens_is_accepted(said: dict[str, Any]) -> None:
    assert chat(**said) == chat()


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"colour": "red"}}, "text.colour"),
        ({"reasoning": {"context": "all"}}, "reasoning.context"),
        ({"reasoning": {"depth": 3}}, "reasoning.depth"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"messages": [HI]}, "messages"),
        ({"tools": [LS], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(said: dict[str, Any], param: str) -> None:
    error = refused(said)

    assert isinstance(error, UnsupportedParameter)
    assert error.param == param


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"input": 1}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_9"}]}, "input[0]"),
        ({"input": [{"role": "critic"}]}, "input[0].role"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"tools": {}}, "tools"),
        ({"text": "x"}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"previous_response_id": "resp_9"}, None),
    ],
)
def test_what_is_wrong_is_named(said: dict[str, Any], param: str | None) -> None:
    error = refused(said)

    assert error.status == 400
    assert error.param == param


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"{", MalformedJson), (b"[]", InvalidRequest), (b'{"input": "hi"}', MissingModelField)],
)
def test_a_body_that_is_none_is_refused(body: bytes, kind: type[ApiError]) -> None:
    with pytest.raises(kind):
        decode_responses(body, FakeMemory(), stores=True)


def test_a_session_is_known_by_its_cache_key_else_by_its_head() -> None:
    named = call(prompt_cache_key="k")
    one, longer = call(), call(input=[HI, {"role": "assistant", "content": "x"}, HI])

    assert named.affinity == "k"
    assert one.affinity == longer.affinity
    assert one.affinity != call(input="other").affinity


def test_a_conversation_keeps_its_session_as_it_goes_on() -> None:
    first = call(input="one")

    assert call(previous_response_id="resp_1").affinity == first.affinity


def test_a_budget_learns_the_limit_of_the_answer() -> None:
    assert (call(max_output_tokens=9).output_limit, call().output_limit) == (9, None)


def completion(text: str = "Hello") -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"message": message, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return orjson.dumps({"choices": choices, "usage": usage})


def remembered(answers: Iterable[ResponsesCall]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for answered in answers:
        answered.answer("m", completion())
        if isinstance(answered.memory, FakeMemory):
            found.extend(answered.memory.kept)
    return found


def test_what_is_stored_can_be_listed_and_gone_on_from() -> None:
    items = [HI, {"role": "assistant", "content": None}, {**LS, "type": "reasoning", "id": None}]

    ((response, kept),) = remembered([call(input=items)])

    key = response["id"].removeprefix("resp_")
    assert response["store"] is True
    assert kept[0] == {
        "type": "message",
        "id": f"msg_{key}_i0",
        "role": "user",
        "content": [{"type": "input_text", "text": "hi"}],
    }
    assert kept[1]["content"] == [{"type": "output_text", "text": "", "annotations": []}]
    assert (kept[2]["type"], kept[2]["id"]) == ("reasoning", f"in_{key}_i2")


def test_an_item_whose_id_is_none_gets_one() -> None:
    ((response, kept),) = remembered([call(input=[{**HI, "id": ["msg"]}])])

    assert kept[0]["id"] == response["id"].replace("resp_", "msg_") + "_i0"


def test_an_item_keeps_the_id_it_came_with() -> None:
    ((_, kept),) = remembered([call(input=[{**HI, "id": "msg_mine"}])])

    assert kept[0]["id"] == "msg_mine"


@pytest.mark.parametrize(("said", "stores"), [({"store": False}, True), ({}, False)])
def test_nothing_is_stored_that_must_not_be(said: dict[str, Any], stores: bool) -> None:
    asked = call(stores=stores, **said)

    assert remembered([asked]) == []
    assert asked.outline.response("completed")["store"] is False


def test_the_response_repeats_what_was_asked() -> None:
    asked: dict[str, Any] = {
        "instructions": "Be terse.",
        "temperature": 0.5,
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "previous_response_id": "resp_1",
        "tool_choice": "none",
        "top_logprobs": 2,
    }

    response = call(**asked).outline.response("in_progress")

    assert {name: response[name] for name in asked} == asked


@pytest.mark.parametrize("name", ["summary", "generate_summary"])
def test_a_summary_may_be_asked_for_by_both_names(name: str) -> None:
    asked = call(reasoning={name: "auto"})

    assert asked.outline.wants_summary
    assert asked.outline.response("in_progress")["reasoning"]["summary"] == "auto"
