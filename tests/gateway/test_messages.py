"""Anthropic's Messages, as a node is asked for them."""

from typing import Any

import orjson
import pytest

from anthropic_requests import USER, asked, decoded, refusal
from cortex.gateway.dialects.messages import MessagesCall, decode_messages
from cortex.ipc.errors import MalformedJson

ADAPTIVE = {"type": "adaptive", "display": "updates"}
SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}}}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
CALL = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {}}


def last(content: Any) -> list[dict[str, Any]]:
    """Return a conversation whose last turn is the assistant's."""
    return [*USER, {"role": "assistant", "content": content}]


def test_a_plain_request_becomes_a_chat_request() -> None:
    assert asked() == {"model": "node-id", "max_tokens": 10, "messages": USER, "stream": False}


def test_a_stream_tells_its_usage_in_a_chunk_for_engines_that_have_no_comment() -> None:
    assert asked(stream=True)["stream_options"] == {"include_usage": True}


def test_sampling_parameters_are_passed_on() -> None:
    body = asked(temperature=0.5, top_p=0.9, top_k=4, stop_sequences=["END"], stream=True)

    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 0.9, 4)
    assert (body["stop"], body["stream"]) == (["END"], True)


def test_no_tokens_at_all_warm_the_cache() -> None:
    assert asked(max_tokens=0)["max_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "thinking", "effort"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, ("enabled", 2048), None),
        ({"thinking": {"type": "disabled"}}, ("disabled", None), None),
        ({"thinking": ADAPTIVE}, ("adaptive", None), None),
        ({"thinking": ADAPTIVE, "output_config": {"effort": "xhigh"}}, ("adaptive", None), "xhigh"),
        ({"output_config": {"effort": "low"}}, None, "low"),
        ({"output_config": {"effort": None}}, None, None),
        ({"thinking": None}, None, None),
    ],
    ids=str,
)
def test_thinking_and_effort_go_to_the_nodes_one_rule(
    fields: dict[str, Any], thinking: tuple[str, int | None] | None, effort: str | None
) -> None:
    body = asked(**fields)

    said = body.get("thinking")
    assert (said and (said["type"], said.get("budget_tokens"))) == thinking
    assert body.get("reasoning_effort") == effort


def test_the_effort_of_the_last_turn_that_says_one_holds() -> None:
    turns = [
        {"role": "system", "content": "a", "output_config": {"effort": "low"}},
        *USER,
        {"role": "system", "output_config": {"effort": "max"}},
        {"role": "system", "content": "b", "output_config": {}},
    ]

    body = asked(messages=turns, output_config={"effort": "medium"})

    assert body["reasoning_effort"] == "max"
    assert [turn["content"] for turn in body["messages"]] == ["a", "hi", "b"]


@pytest.mark.parametrize(
    "fields", [{"output_config": {"format": FORMAT}}, {"output_format": FORMAT}], ids=str
)
def test_a_format_is_enforced_by_the_node(fields: dict[str, Any]) -> None:
    form = asked(**fields)["response_format"]

    assert form["type"] == "json_schema"
    assert form["json_schema"]["schema"] == SCHEMA


def test_a_format_at_two_places_is_refused() -> None:
    assert refusal(output_config={"format": FORMAT}, output_format=FORMAT).param == "output_format"


@pytest.mark.parametrize(
    "fields",
    [
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"context_management": {"edits": []}},
        {"output_config": {"format": None, "task_budget": None}},
        {"metadata": {"user_id": "{}", "more": 1}},
        {"metadata": None},
        {"service_tier": "auto"},
        {"safeguards": [{"type": "x"}]},
        {"speed": "fast"},
        {"betas": ["x"]},
        {"fallbacks": "default"},
        {"diagnostics": {"previous_message_id": "msg_1"}},
        {"tools": [], "tool_choice": {"type": "auto"}},
        {"tools": None, "tool_choice": {"type": "none"}},
        {"cache_control": {"type": "ephemeral"}},
        {"inference_geo": "global"},
        {"mcp_servers": []},
        {"messages": [{**USER[0], "id": "msg_1", "type": "message", "usage": {}}]},
        {"messages": [{**USER[0], "clear_at": "never"}]},
    ],
    ids=str,
)
def test_what_cannot_change_the_tokens_is_accepted(fields: dict[str, Any]) -> None:
    assert asked(**fields) == asked()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"compaction": {"type": "summarize"}}, "compaction"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"messages": [{**USER[0], "frobnicate": "x"}]}, "messages.0.frobnicate"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits.0",
        ),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}},
            "context_management.edits.0",
        ),
        ({"messages": last([{"type": "thinking", "thinking": "Hm"}])}, "messages.1"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)

    assert (error.code, error.param) == ("unsupported_parameter", param)
    assert param.split(".", maxsplit=1)[0] in str(error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "ten"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": 3}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "system"}]}, "messages"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"thinking": "yes"}, "thinking"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
        (
            {"messages": [{**USER[0], "output_config": {"format": {}}}]},
            "messages[0].output_config.format",
        ),
        ({"metadata": "me"}, "metadata"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.code, error.param) == (400, "invalid_request", param)


@pytest.mark.parametrize("depth", [100, 960, 975, 990])
def test_a_body_is_taken_or_refused_however_deeply_it_is_nested(depth: int) -> None:
    schema = b'{"x":' * depth + b"{}" + b"}" * depth
    tool = b'{"name":"a","input_schema":' + schema + b"}"
    body = b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"hi"}],"tools":[%b]}'

    call = _decoded_or_none(body % tool)

    assert call is None or _as_from_deeper(call, 30).count(b'{"x":') == depth


def _decoded_or_none(body: bytes) -> MessagesCall | None:
    try:
        return decode_messages(body, strip_billing_block=True, counts_only=False)
    except MalformedJson:
        return None


def _as_from_deeper(call: MessagesCall, frames: int) -> bytes:
    """Return the body, asked for from deeper in the stack than it has been read."""
    return _as_from_deeper(call, frames - 1) if frames else call.body("node-id")


@pytest.mark.parametrize(
    "content",
    [
        "The answer is (",
        [{"type": "text", "text": "The answer is ("}],
        [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "The answer is ("}],
        [{"type": "text", "text": "The "}, {"type": "text", "text": "answer is ("}],
    ],
    ids=str,
)
def test_a_last_turn_of_the_assistant_is_continued(content: Any) -> None:
    body = asked(messages=last(content))

    assert body["messages"][-1]["role"] == "assistant"
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize("content", ["", []])
def test_an_empty_last_turn_of_the_assistant_is_no_turn(content: Any) -> None:
    assert asked(messages=last(content)) == asked()


def test_a_conversation_that_is_only_an_empty_turn_is_refused() -> None:
    error = refusal(messages=[{"role": "assistant", "content": ""}])

    assert (error.code, error.param) == ("unsupported_parameter", "messages.0")


def test_a_last_turn_that_ends_in_whitespace_is_refused_in_anthropics_words() -> None:
    error = refusal(messages=last("The answer is "))

    assert str(error) == "messages: final assistant content cannot end with trailing whitespace"


def test_a_last_turn_that_waits_for_a_result_is_refused_by_the_calls_id() -> None:
    error = refusal(messages=last([CALL]))

    assert (error.code, error.param) == ("invalid_request", "messages.1")
    assert "`tool_use` ids were found without `tool_result`" in str(error)
    assert "t1" in str(error)


def test_counting_needs_no_limit_and_counts_what_makes_the_prompt() -> None:
    tool = {"name": "Bash", "input_schema": {"type": "object"}}
    fields: dict[str, Any] = {
        "messages": last("The answer is ("),
        "tools": [tool],
        "tool_choice": {"type": "tool", "name": "Bash", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 9},
        "output_config": {"effort": "low", "format": FORMAT},
        "temperature": 0.5,
        "stop_sequences": ["END"],
    }

    counted = decoded(max_tokens=..., counts_only=True, **fields).count_body("node-id")

    whole = asked(**fields)
    assert orjson.loads(counted) == {
        name: whole[name]
        for name in (
            "model",
            "messages",
            "tools",
            "tool_choice",
            "thinking",
            "reasoning_effort",
            "add_generation_prompt",
            "continue_final_message",
        )
    }


@pytest.mark.parametrize("content", ["ends in a blank ", [CALL]], ids=str)
def test_counting_takes_a_last_turn_that_cannot_be_continued(content: Any) -> None:
    call = decoded(messages=last(content), counts_only=True)

    counted = orjson.loads(call.count_body("node-id"))
    assert counted["add_generation_prompt"] is False
    assert "continue_final_message" not in counted


@pytest.mark.parametrize(
    "user_id",
    [
        "user_1_account__session_0a-b",
        '{"device_id": "d", "session_id": "0a-b"}',
    ],
)
def test_claude_codes_session_is_what_the_call_is_known_by(user_id: str) -> None:
    assert decoded(metadata={"user_id": user_id}).affinity == "0a-b"


def test_without_a_session_the_head_of_the_conversation_is_what_it_is_known_by() -> None:
    more = [*USER, {"role": "assistant", "content": "yes"}, *USER]

    first, second, other = (
        decoded(messages=turns).affinity for turns in (USER, more, [{**USER[0], "content": "ho"}])
    )

    assert first is not None
    assert (first == second, first == other) == (True, False)


def test_the_limit_of_the_answer_is_known_to_budgets() -> None:
    assert decoded(max_tokens=32000).output_limit == 32000
