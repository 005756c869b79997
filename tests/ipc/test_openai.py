"""Requests are read strictly: what is accepted is honoured, what is not is named."""

from typing import Any

import msgspec
import pytest

from cortex.ipc import openai
from cortex.ipc.errors import (
    InvalidRequest,
    MalformedJson,
    MissingModelField,
    UnsupportedParameter,
)
from cortex.ipc.openai_answers import ChatCompletionChunk
from cortex.ipc.requests import decode_object
from cortex.ipc.tools import FunctionCall, ToolCall

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def chat(**more: object) -> openai.ChatCompletionRequest:
    body = msgspec.json.encode({**HELLO, **more})
    return openai.decode_request(body, openai.ChatCompletionRequest)


def text(**more: object) -> openai.CompletionRequest:
    body = msgspec.json.encode({"model": "m", "prompt": "hello", **more})
    return openai.decode_request(body, openai.CompletionRequest)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"a": }'])
def test_a_body_that_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedJson):
        openai.decode_request(body, openai.ChatCompletionRequest)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object_is_invalid(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="object"):
        openai.decode_request(body, openai.ChatCompletionRequest)


@pytest.mark.parametrize("model", [None, 3, ""])
def test_a_body_without_a_model_says_so(model: object) -> None:
    with pytest.raises(MissingModelField) as refusal:
        chat(model=model)

    assert refusal.value.param == "model"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "look"}]),
        ("function_call", "auto"),
        ("top_logprobs", 5),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "the end"),
        ("min_tokens", 3),
    ],
)
def test_a_known_parameter_that_is_not_honoured_is_refused_by_name(
    name: str, value: object
) -> None:
    with pytest.raises(UnsupportedParameter, match=name) as refusal:
        chat(**{name: value})

    assert refusal.value.param == name


def test_one_is_not_the_same_as_true() -> None:
    with pytest.raises(UnsupportedParameter):
        chat(echo=0)


def test_a_parameter_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameter, match="temprature"):
        chat(temprature=0.5)


@pytest.mark.parametrize("name", sorted(openai.PARAMETERS.neutral))
def test_a_neutral_value_asks_for_nothing(name: str) -> None:
    for value in openai.PARAMETERS.neutral[name]:
        chat(**{name: value})


@pytest.mark.parametrize("name", sorted(openai.PARAMETERS.without_effect))
def test_a_parameter_without_effect_is_accepted(name: str) -> None:
    chat(**{name: "anything"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 1.5),
        ("seed", 2**64),
        ("max_tokens", -1),
        ("stop", 5),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hello"),
        ("stream_options", 3),
        ("stream_options", {"continuous_usage_stats": True}),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("n", 0),
        ("n", 129),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 7),
        ("reasoning_effort", "a lot"),
        ("thinking", {"type": "perhaps"}),
        ("thinking", {"type": "enabled", "budget_tokens": 0}),
        ("parallel_tool_calls", "no"),
        ("tools", {"type": "function"}),
        ("tool_choice", 3),
        ("tool_choice", "any"),
        ("tool_choice", {"type": "function", "function": {}}),
        ("tool_choice", "required"),
        ("response_format", {"type": "grammar"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "text", "json_schema": {"name": "x", "schema": {}}}),
        ("structured_outputs", {}),
        ("structured_outputs", {"json_object": False}),
        ("structured_outputs", {"json": {}, "regex": "a"}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"choice": ["yes", ""]}),
        ("structured_outputs", {"regex": "a" * 16_385}),
        ("structured_outputs", {"whitespace_pattern": " "}),
    ],
)
def test_a_value_of_the_wrong_type_or_size_names_its_place(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat(**{name: value})

    assert refusal.value.param is not None
    assert refusal.value.param.startswith(name)


def test_a_place_inside_a_list_is_named() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat(messages=[{"role": "user"}, {"content": "who?"}])

    assert refusal.value.param == "messages[1].role"


def test_a_replayed_tool_turn_with_null_content_is_a_message() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}

    message = chat(messages=[turn]).messages[0]

    assert message.content is None
    assert message.tool_calls == [ToolCall("c", FunctionCall("look", "{}"))]


def test_an_answer_of_the_sdk_may_come_back_as_it_is() -> None:
    said: dict[str, object] = {"role": "assistant", "content": "Yes.", "annotations": []}
    answer = said | dict.fromkeys(("refusal", "audio", "function_call", "tool_calls"))

    assert chat(messages=[answer]).messages[0].content == "Yes."


@pytest.mark.parametrize("field", [{"audio": {"id": "a"}}, {"function_call": {}}, {"mood": "good"}])
def test_a_field_of_a_message_that_would_be_ignored_is_refused_with_its_place(
    field: dict[str, object],
) -> None:
    name = next(iter(field))

    with pytest.raises(UnsupportedParameter, match=name) as refusal:
        chat(messages=[{"role": "user", "content": "hi"}, {"role": "user", **field}])

    assert refusal.value.param == f"messages[1].{name}"


LOOK = {"name": "look", "description": "Look.", "parameters": {"type": "object", "x": [1, None]}}


def test_tools_stay_as_they_came() -> None:
    tool = {"function": dict(reversed(LOOK.items())), "type": "function"}

    asked = chat(tools=[tool])

    assert asked.tools == [tool]
    assert [*asked.offered_tools[0]["function"]] == ["parameters", "description", "name"]


def test_tools_that_must_not_be_called_are_not_offered() -> None:
    assert (
        chat(tools=[{"type": "function", "function": LOOK}], tool_choice="none").offered_tools == []
    )


@pytest.mark.parametrize(
    ("function", "place"),
    [
        ({}, "tools[1].function.name"),
        ({"name": ""}, "tools[1].function.name"),
        ({"name": "two words"}, "tools[1].function.name"),
        ({"name": "look\n"}, "tools[1].function.name"),
        ({"name": "n" * 129}, "tools[1].function.name"),
        ({**LOOK, "parameters": "string"}, "tools[1].function.parameters"),
        ({**LOOK, "parameter": {}}, "tools[1].function.parameter"),
    ],
)
def test_a_tool_of_the_wrong_shape_names_its_place(function: dict[str, object], place: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat(
            tools=[
                {"type": "function", "function": LOOK},
                {"type": "function", "function": function},
            ]
        )

    assert refusal.value.param == place


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        ({"type": "web_search"}, "tools[0].type"),
        ({"type": "custom", "custom": {"name": "x"}}, "tools[0].type"),
    ],
)
def test_a_tool_that_cannot_be_honoured_is_refused(tool: dict[str, object], place: str) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        chat(tools=[tool])

    assert refusal.value.param == place


NAMED = {"type": "function", "function": {"name": "look"}}
OFFERED = [{"type": "function", "function": {**LOOK, "strict": True}}]


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_may_be_demanded_of_a_tool_that_is_there(choice: object) -> None:
    assert chat(tools=OFFERED, tool_choice=choice).offered_tools == OFFERED


@pytest.mark.parametrize("kind", ["allowed_tools", "custom", 3])
def test_a_choice_of_another_kind_is_refused_as_not_supported(kind: object) -> None:
    with pytest.raises(UnsupportedParameter, match=f"type {kind!r} is not supported") as refusal:
        chat(tools=OFFERED, tool_choice={"type": kind, kind: {"mode": "auto"}})

    assert refusal.value.param == "tool_choice"


def test_a_format_of_a_text_completion_is_refused_with_what_there_is_instead() -> None:
    with pytest.raises(UnsupportedParameter, match="use 'structured_outputs'") as refusal:
        text(response_format={"type": "json_object"})

    assert refusal.value.param == "response_format"


def test_a_tool_that_is_named_and_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'look'") as refusal:
        chat(tools=[{"type": "function", "function": {"name": "go"}}], tool_choice=NAMED)

    assert refusal.value.param == "tool_choice.function.name"


JSON_OBJECT = {"response_format": {"type": "json_object"}}
A_WORD = {"structured_outputs": {"regex": "[a-z]+"}}


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({**JSON_OBJECT, **A_WORD}, "structured_outputs"),
        ({**JSON_OBJECT, "tools": OFFERED, "tool_choice": "required"}, "response_format"),
        ({**A_WORD, "tools": OFFERED, "tool_choice": NAMED}, "structured_outputs"),
    ],
)
def test_two_demands_that_leave_each_other_no_room_are_refused(
    more: dict[str, object], place: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat(**more)

    assert refusal.value.param == place


def test_a_plain_text_is_no_demand_beside_another() -> None:
    assert chat(response_format={"type": "text"}, **A_WORD).structured_outputs is not None


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert chat().wanted_logprobs is None
    assert chat(logprobs=True).wanted_logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).wanted_logprobs == 4
    assert text(logprobs=0).wanted_logprobs == 0
    assert text(logprobs=5).wanted_logprobs == 5


def test_the_best_of_as_many_as_are_shown_is_no_choice() -> None:
    assert text(n=3, best_of=3).choices == 3
    with pytest.raises(UnsupportedParameter, match="best_of"):
        text(n=3, best_of=4)


def test_keys_of_a_bias_are_token_ids() -> None:
    assert chat(logit_bias={"5": -100}).logit_bias == {5: -100.0}


def test_the_newer_name_of_the_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=3).limit_tokens == 3
    assert chat(max_tokens=5).limit_tokens == 5
    assert chat().limit_tokens is None


def test_one_stop_string_or_several() -> None:
    assert chat(stop="a").stop_strings == ["a"]
    assert chat(stop=["a", "", "b"]).stop_strings == ["a", "b"]
    assert chat(stop=None).stop_strings == []


def test_a_usage_chunk_comes_only_when_asked() -> None:
    assert not chat(stream=True).wants_usage_chunk
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage_chunk


@pytest.mark.parametrize(
    ("prompt", "read_as"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        (["text"], ["text"]),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([], [[]]),
    ],
)
def test_a_prompt_is_text_or_token_ids(prompt: object, read_as: object) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})

    assert openai.decode_request(body, openai.CompletionRequest).prompts == read_as


@pytest.mark.parametrize("prompt", [[-1], [2**31], None, 5, [1, "a"], [[1], 2], ["a", [1]]])
def test_any_other_prompt_is_refused(prompt: object) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})

    with pytest.raises(InvalidRequest):
        openai.decode_request(body, openai.CompletionRequest)


def test_a_chunk_without_usage_leaves_the_field_out() -> None:
    chunk = ChatCompletionChunk(id="c", created=1, model="m", choices=[])

    assert b"usage" not in msgspec.json.encode(chunk)


def embed(given: object, **more: object) -> openai.EmbeddingRequest:
    body = msgspec.json.encode({"model": "m", "input": given, **more})
    return openai.decode_request(body, openai.EmbeddingRequest)


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_inputs_are_texts_or_token_ids(given: object, read_as: object) -> None:
    assert embed(given).inputs == read_as


@pytest.mark.parametrize(
    "given", [[], None, 5, ["a", 1], [[1], "a"], [[1], [-1]], [["a"]], ["a"] * 2049, [[1]] * 2049]
)
def test_any_other_input_is_refused(given: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        embed(given)

    assert refusal.value.param is not None
    assert refusal.value.param.startswith("input")


def test_one_input_may_have_more_tokens_than_a_request_inputs() -> None:
    assert embed([5] * 3000).inputs == [[5] * 3000]


@pytest.mark.parametrize(
    ("name", "value"), [("dimensions", 0), ("encoding_format", "int8"), ("dimensions", "many")]
)
def test_what_is_asked_of_a_vector_is_checked(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        embed("one", **{name: value})

    assert refusal.value.param == name


def test_tokens_are_counted_of_messages_or_of_a_prompt() -> None:
    for body in (
        {},
        {"prompt": "a", "messages": []},
        {"prompt": "a", "messages": HELLO["messages"]},
    ):
        with pytest.raises(InvalidRequest):
            openai.decode_request(
                msgspec.json.encode({"model": "m", **body}), openai.TokenizeRequest
            )


def test_several_prompts_have_as_many_choices_each() -> None:
    asked = text(prompt=["a", "b", "c"], n=2, best_of=2)

    assert (asked.prompts, asked.choices) == (["a", "b", "c"], 6)


def test_more_answers_than_there_can_be_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 128") as refused:
        text(prompt=["a"] * 65, n=2)

    assert refused.value.param == "prompt"


def test_an_echo_beside_a_suffix_is_refused() -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        text(suffix="b", echo=True)

    assert refused.value.param == "echo"
    assert text(suffix="", echo=True).echo


SAID = {"role": "assistant", "content": "Par"}
OPEN = {"continue_final_message": True}


def tokenized(**more: object) -> openai.TokenizeRequest:
    body = msgspec.json.encode({**HELLO, **more})
    return openai.decode_request(body, openai.TokenizeRequest)


@pytest.mark.parametrize("ask", [chat, tokenized])
@pytest.mark.parametrize(
    ("more", "asks_for_turn"),
    [
        ({}, True),
        ({"add_generation_prompt": True, "continue_final_message": False}, True),
        ({"add_generation_prompt": False}, False),
        ({"add_generation_prompt": False, **OPEN}, False),
        (OPEN, False),
    ],
)
def test_a_conversation_ends_as_it_says(ask: Any, more: Any, asks_for_turn: bool) -> None:
    asked = ask(messages=[*HELLO["messages"], SAID], **more)

    assert asked.asks_for_turn == asks_for_turn


@pytest.mark.parametrize("ask", [chat, tokenized])
@pytest.mark.parametrize(
    ("last", "more", "param"),
    [
        (SAID, {"add_generation_prompt": True}, "continue_final_message"),
        ({"role": "user", "content": "x"}, {}, "messages[1].role"),
        (
            {**SAID, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            {},
            "messages[1].tool_calls",
        ),
    ],
)
def test_a_turn_that_cannot_be_continued_is_named(
    ask: Any, last: Any, more: Any, param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(messages=[*HELLO["messages"], last], **OPEN, **more)

    assert refused.value.param == param


def test_a_text_has_no_turn_to_continue() -> None:
    body = msgspec.json.encode({"model": "m", "prompt": "x", **OPEN})

    with pytest.raises(InvalidRequest) as refused:
        openai.decode_request(body, openai.TokenizeRequest)
    assert refused.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("body", "at"), [(b'{"a": "x\xff"}', 8), (b'{"a": "\xc3\xa9", "b": "\xc3"}', 18)]
)
def test_what_is_not_utf_8_is_told_with_its_place_in_the_body(body: bytes, at: int) -> None:
    with pytest.raises(MalformedJson) as refusal:
        decode_object(body)

    assert body[at] >= 0x80
    assert str(refusal.value) == f"the body is not JSON: it is not UTF-8 (byte {at})"
