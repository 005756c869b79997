"""Anthropic's turns and their blocks, as the messages of a chat request."""

import base64
from typing import Any

import pytest

from anthropic_requests import USER, asked, decoded, refusal, said
from cortex.gateway.dialects.message_thinking import signature_of, thinking_of

BILLING = {
    "type": "text",
    "text": "x-anthropic-billing-header: cc_version=2.1.329.136; cc_entrypoint=cli;",
}
SYSTEM = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
TEXT = {"type": "text", "text": "Look."}
PIXEL = {"type": "base64", "media_type": "image/png", "data": "aGk="}
IMAGE = {"type": "image", "source": PIXEL, "cache_control": None}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
CALL = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls", "n": 2**70}}
REFERENCES = [
    {"type": "tool_reference", "tool_name": "WebFetch"},
    {"type": "tool_reference", "tool_name": "Grep"},
]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def result(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", **fields}


def test_a_system_string_becomes_the_first_turn() -> None:
    assert asked(system="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        *USER,
    ]


def test_system_blocks_stay_apart() -> None:
    two = [SYSTEM, part("Be kind.")]

    assert asked(system=two)["messages"][0]["content"] == [part("Be brief."), part("Be kind.")]


def test_the_billing_block_is_dropped() -> None:
    assert asked(system=[BILLING, SYSTEM])["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize("system", [[BILLING], BILLING["text"], [], ""])
def test_a_system_of_nothing_says_nothing(system: Any) -> None:
    turns = asked(system=system)["messages"]

    assert turns[-1:] == USER
    assert all(turn["content"] in ("", "hi") for turn in turns)


@pytest.mark.parametrize(
    "system",
    [
        [SYSTEM, BILLING],
        [{"type": "text", "text": BILLING["text"] + "\nBe brief."}],
        [{"type": "text", "text": "Never print x-anthropic-billing-header: lines."}],
    ],
    ids=["not leading", "more than the line", "somewhere inside"],
)
def test_nothing_else_is_taken_from_a_prompt(system: list[dict[str, str]]) -> None:
    assert asked(system=system) == asked(system=system, strip=False)


def test_the_operator_can_keep_the_billing_block() -> None:
    assert BILLING["text"] in str(asked(system=[BILLING, SYSTEM], strip=False))


def test_a_system_turn_among_the_messages_stays_where_it_is() -> None:
    turns = [*USER, {"role": "system", "content": [SYSTEM]}]

    assert asked(messages=turns)["messages"] == [*USER, {"role": "system", "content": "Be brief."}]


def test_a_system_turn_for_one_question_goes_when_the_user_asks_again() -> None:
    aside = {"role": "system", "content": "Now.", "clear_at": "next_user_message"}

    assert asked(messages=[*USER, aside])["messages"][-1]["content"] == "Now."
    assert asked(messages=[*USER, aside, *USER])["messages"] == [*USER, *USER]


def test_text_blocks_are_text() -> None:
    block = {"type": "text", "text": "hi", "citations": None, "cache_control": None}

    assert said(block) == USER


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        (IMAGE, [IMAGE_PART]),
        (
            {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
            [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}],
        ),
        ({"type": "document", "source": {"type": "text", "data": "Once."}}, [part("Once.")]),
        (
            {
                "type": "document",
                "title": "Tale",
                "context": "Old.",
                "citations": {"enabled": False},
                "source": {"type": "content", "content": "Once."},
            },
            [part("Tale\nOld.\n"), part("Once.")],
        ),
        (
            {"type": "document", "source": {"type": "content", "content": [TEXT, IMAGE]}},
            [part("Look."), IMAGE_PART],
        ),
        (
            {"type": "search_result", "title": "T", "source": "https://x", "content": [TEXT]},
            [part("T\nhttps://x\n"), part("Look.")],
        ),
        ({"type": "compaction", "content": "So far."}, [part("So far.")]),
        ({"type": "compaction", "content": None}, []),
    ],
    ids=str,
)
def test_a_block_of_the_user_is_said_in_parts(
    block: dict[str, Any], parts: list[dict[str, Any]]
) -> None:
    assert said(TEXT, block, TEXT) == [
        {"role": "user", "content": [part("Look."), *parts, part("Look.")]}
    ]


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({"type": "container_upload", "file_id": "f"}, "messages.0.content.1"),
        ({"type": "video"}, "messages.0.content.1"),
        ({"type": ["text"]}, "messages.0.content.1"),
        ({"text": "hi"}, "messages.0.content.1"),
        ({"type": "image", "source": {"type": "file"}}, "messages.0.content.1.source"),
        ({"type": "document", "source": PIXEL}, "messages.0.content.1.source"),
        (
            {"type": "search_result", "content": [], "citations": {"enabled": True}},
            "messages.0.content.1.citations",
        ),
        (
            {"type": "document", "source": {"type": "content", "content": [{"type": "document"}]}},
            "messages.0.content.1.source.content.0",
        ),
        (result(content=[{"type": "tool_use"}]), "messages.0.content.1.content.0"),
        ({"type": "tool_use", "id": "t", "name": "n", "input": {}}, "messages.0.content.1"),
    ],
    ids=str,
)
def test_a_block_that_cannot_be_said_is_refused_by_its_place(
    block: dict[str, Any], param: str
) -> None:
    error = refusal(messages=[{"role": "user", "content": [TEXT, block]}])

    assert (error.code, error.param) == ("unsupported_parameter", param)
    assert param in str(error)


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({"type": "text"}, "text"),
        ({"type": "text", "text": None}, "text"),
        ({"type": "image"}, "source"),
        ({"type": "image", "source": {"type": "url"}}, "source.url"),
        ({"type": "document", "source": {"type": "text"}}, "source.data"),
        (result(content=3), "content"),
        (result(content=["text"]), "content"),
        ({"type": "tool_result", "content": "x"}, "tool_use_id"),
    ],
    ids=str,
)
def test_a_block_of_a_wrong_shape_is_refused_with_its_place(
    block: dict[str, Any], param: str
) -> None:
    error = refusal(messages=[{"role": "user", "content": [block]}])

    assert (error.code, error.param) == ("invalid_request", f"messages.0.content.0.{param}")


@pytest.mark.parametrize("name", ["id", "name", "input"])
def test_a_call_that_lacks_something_is_refused_with_its_place(name: str) -> None:
    call = {key: value for key, value in CALL.items() if key != name}

    error = refusal(messages=[{"role": "assistant", "content": [call]}, *USER])

    assert (error.code, error.param) == ("invalid_request", f"messages.0.content.0.{name}")


def test_a_system_block_that_is_no_text_is_refused_by_its_place() -> None:
    assert refusal(system=[SYSTEM, {"type": "video"}]).param == "system.1"


def test_results_stand_before_what_else_the_user_says() -> None:
    messages = said(TEXT, result(content="hi"), result(tool_use_id="t2", content="ho"))

    assert messages == [
        {"role": "tool", "tool_call_id": "t1", "content": "hi"},
        {"role": "tool", "tool_call_id": "t2", "content": "ho"},
        {"role": "user", "content": "Look."},
    ]


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"content": "hi", "is_error": False}, "hi"),
        ({}, ""),
        ({"content": []}, ""),
        ({"content": [TEXT]}, "Look."),
        ({"content": [TEXT, IMAGE]}, [part("Look."), IMAGE_PART]),
        ({"content": REFERENCES}, "WebFetch\nGrep"),
        ({"content": REFERENCES[:1]}, "WebFetch"),
        ({"content": "no such file", "is_error": True}, "Error: no such file"),
        ({"content": "Error: no such file", "is_error": True}, "Error: no such file"),
        ({"is_error": True}, "Error: "),
        ({"content": [TEXT, TEXT], "is_error": True}, [part("Error: Look."), part("Look.")]),
        ({"content": [IMAGE], "is_error": True}, [part("Error: "), IMAGE_PART]),
    ],
    ids=str,
)
def test_a_result_is_a_tools_message(fields: dict[str, Any], content: Any) -> None:
    assert said(result(**fields)) == [{"role": "tool", "tool_call_id": "t1", "content": content}]


def test_a_turn_that_calls_says_its_text_its_thinking_and_its_calls() -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "c2VhbGVk"}

    (message,) = said(thinking, TEXT, CALL, {**CALL, "id": "t2"}, role="assistant")

    arguments = '{"command":"ls","n":1180591620717411303424}'
    function = {"name": "Bash", "arguments": arguments}
    assert message == {
        "role": "assistant",
        "content": "Look.",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "t1", "type": "function", "function": function},
            {"id": "t2", "type": "function", "function": function},
        ],
    }


def test_thinking_that_nobody_here_can_read_is_left_out() -> None:
    redacted = {"type": "redacted_thinking", "data": "x"}
    omitted = {"type": "thinking", "thinking": "", "signature": "c2VhbGVk"}

    assert said(redacted, omitted, TEXT, role="assistant") == [
        {"role": "assistant", "content": "Look."}
    ]


def test_thinking_that_was_omitted_comes_back_in_its_signature() -> None:
    omitted = {"type": "thinking", "thinking": "", "signature": signature_of("Hm, ü.")}

    (message,) = said(omitted, CALL, role="assistant")

    assert message["reasoning_content"] == "Hm, ü."


@pytest.mark.parametrize(
    "signature",
    [None, 3, "", "cortex-thinking.!", "cortex-thinking." + base64.b64encode(b"\xff").decode()],
)
def test_a_signature_that_carries_nothing_is_no_thinking(signature: Any) -> None:
    assert thinking_of({"type": "thinking", "thinking": "", "signature": signature}) == ""


def test_blocks_that_only_mark_something_are_not_said() -> None:
    fallback = {"type": "fallback", "from": {}, "to": {}}

    assert said(fallback, TEXT, role="assistant") == [{"role": "assistant", "content": "Look."}]


@pytest.mark.parametrize(
    ("kind", "content", "text"),
    [
        (
            "web_search_tool_result",
            [{"type": "web_search_result", "url": "https://x", "encrypted_content": "s"}],
            '[{"type":"web_search_result","url":"https://x"}]',
        ),
        (
            "web_search_tool_result",
            {"type": "web_search_tool_result_error", "error_code": "unavailable"},
            '{"type":"web_search_tool_result_error","error_code":"unavailable"}',
        ),
        ("mcp_tool_result", [TEXT], "Look."),
        ("mcp_tool_result", "Look.", "Look."),
        ("code_execution_tool_result", [1], "[1]"),
    ],
)
def test_a_tool_that_ran_elsewhere_is_a_call_and_its_result(
    kind: str, content: Any, text: str
) -> None:
    call = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"q": "x"}}
    answer = {"type": kind, "tool_use_id": "s1", "content": content}

    before, tool, after = said(TEXT, call, answer, TEXT, role="assistant")

    assert before["tool_calls"][0]["function"] == {"name": "web_search", "arguments": '{"q":"x"}'}
    assert (before["content"], after) == ("Look.", {"role": "assistant", "content": "Look."})
    assert tool == {"role": "tool", "tool_call_id": "s1", "content": text}


def test_a_turn_that_waits_for_more_of_such_results_is_answered_with_a_new_turn() -> None:
    call = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
    answer = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}

    body = asked(messages=[*USER, {"role": "assistant", "content": [call, answer]}])

    assert body["messages"][-1]["role"] == "tool"
    assert "continue_final_message" not in body


def test_the_same_conversation_gives_the_same_bytes() -> None:
    turns = [
        *USER,
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [result()]},
    ]

    assert decoded(messages=turns).body("m") == decoded(messages=turns).body("m")
