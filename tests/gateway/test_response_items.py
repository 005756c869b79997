"""Items of a conversation, as Responses has them, as a node's messages."""

from typing import Any

import pytest

from cortex.gateway.dialects.response_items import messages_of
from cortex.ipc.errors import ApiError, InvalidRequest, UnsupportedParameter

USER = {"type": "message", "role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "a.txt"}
REASONING = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "Hm."}],
    "encrypted_content": None,
}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": text}


def messages(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return messages_of((f"input[{index}]", item) for index, item in enumerate(items))


def called(call_id: str = "c1", name: str = "ls", arguments: str = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("role", ["user", "system", "developer", "assistant"])
def test_a_message_is_one_of_its_role(role: str) -> None:
    assert messages({"role": role, "content": "hi"}) == [{"role": role, "content": "hi"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("hi", "hi"),
        ([{"type": "input_text", "text": "hi"}], "hi"),
        ([{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}], "hi"),
        ([], []),
        (
            [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}],
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        ),
        (
            [{"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"}],
            [
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,AA", "detail": "low"},
                }
            ],
        ),
        ([{"type": "refusal", "refusal": "No."}], [{"type": "refusal", "refusal": "No."}]),
    ],
)
def test_parts_are_chats(content: Any, expected: Any) -> None:
    assert messages({"role": "user", "content": content})[0]["content"] == expected


def test_the_assistants_turn_holds_its_reasoning_its_text_and_its_calls() -> None:
    other = {**CALL, "call_id": "c2", "name": "cat"}

    found = messages(USER, REASONING, said("Let me look."), CALL, other)

    assert found[1:] == [
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "Let me look.",
            "tool_calls": [called(), called("c2", "cat")],
        }
    ]


def test_a_tool_loop_is_turn_after_turn() -> None:
    again = {**CALL, "call_id": "c2"}

    found = messages(USER, REASONING, CALL, RESULT, REASONING, again, RESULT, said("Done."))

    assert [message["role"] for message in found] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found[2] == {"role": "tool", "tool_call_id": "c1", "content": "a.txt"}
    assert [m.get("reasoning_content") for m in found] == [None, "Hm.", None, "Hm.", None, None]


@pytest.mark.parametrize(
    "items",
    [
        (said("One."), said("Two.")),
        (CALL, said("Two.")),
        (said("One."), REASONING),
        (CALL, REASONING),
        (REASONING, REASONING),
    ],
)
def test_what_steps_back_in_a_turns_order_begins_another(items: Any) -> None:
    assert [message["role"] for message in messages(*items)] == ["assistant", "assistant"]


@pytest.mark.parametrize(
    ("item", "reasoning"),
    [
        (REASONING, "Hm."),
        ({**REASONING, "content": None, "summary": [{"type": "summary_text", "text": "S"}]}, "S"),
        ({**REASONING, "content": [], "summary": [{"type": "summary_text", "text": "S"}]}, "S"),
        ({**REASONING, "summary": [{"type": "summary_text", "text": "S"}]}, "Hm."),
        (
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": t} for t in "ab"]},
            "a\n\nb",
        ),
    ],
)
def test_reasoning_survives(item: dict[str, Any], reasoning: str) -> None:
    assert messages(item, CALL)[0]["reasoning_content"] == reasoning


def test_reasoning_that_only_another_server_can_read_is_left_out() -> None:
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}

    assert messages(USER, sealed) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("output", "content"),
    [
        ("text", "text"),
        ([{"type": "input_text", "text": "text"}], "text"),
        ({"stdout": "x"}, '{"stdout":"x"}'),
        (None, "null"),
    ],
)
def test_a_result_is_text_parts_or_json(output: Any, content: str) -> None:
    assert messages(CALL, {**RESULT, "output": output})[1]["content"] == content


def test_a_call_in_a_namespace_has_the_name_that_the_model_knows() -> None:
    found = messages({**CALL, "namespace": "agents", "name": "spawn"})

    assert found[0]["tool_calls"][0]["function"]["name"] == "agents__spawn"


def test_a_call_of_a_custom_tool_is_one_with_its_text() -> None:
    custom = {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": 'a "b"'}
    output = {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"}

    found = messages(custom, output)

    assert found[0]["tool_calls"] == [called("c1", "patch", '{"input":"a \\"b\\""}')]
    assert found[1] == {"role": "tool", "tool_call_id": "c1", "content": "ok"}


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "of the year after next"},
        {"type": ["message"]},
        {},
    ],
)
def test_traces_of_other_servers_tools_are_left_out(item: dict[str, Any]) -> None:
    assert messages(item, USER) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "critic", "content": "x"}, "input[0].role"),
        ({"role": "user", "content": 1}, "input[0].content"),
        ({"role": "user", "content": ["x"]}, "input[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({**CALL, "name": None}, "input[0].name"),
        ({**CALL, "arguments": {}}, "input[0].arguments"),
        ({**CALL, "call_id": 1}, "input[0].call_id"),
        ({**RESULT, "call_id": None}, "input[0].call_id"),
        ({**REASONING, "content": "Hm."}, "input[0].content"),
        ({**REASONING, "content": [{"type": "reasoning_text"}]}, "input[0].content[0].text"),
    ],
)
def test_what_is_wrong_is_named(item: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        messages(item)

    assert caught.value.param == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_file", "file_id": "file-1"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_audio", "data": "x"},
        {"type": ["input_text"], "text": "x"},
    ],
)
def test_content_that_would_be_lost_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        messages({"role": "user", "content": [part]})

    assert isinstance(caught.value, ApiError)
    assert (caught.value.param or "").startswith("input[0].content[0]")
