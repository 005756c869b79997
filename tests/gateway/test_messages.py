"""Anthropic's Messages, as a node is asked for them."""

from typing import Any

import orjson
import pytest

from cortex.gateway.dialects.messages import MessagesCall, decode_messages
from cortex.ipc.errors import ApiError

USER = [{"role": "user", "content": "hi"}]
BILLING = {
    "type": "text",
    "text": "x-anthropic-billing-header: cc_version=2.1.329.136; cc_entrypoint=cli;",
}
SYSTEM = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}


def decoded(*, strip: bool = True, counts_only: bool = False, **fields: Any) -> MessagesCall:
    body = {"model": "m", "max_tokens": 10, "messages": USER, **fields}
    raw = orjson.dumps({name: value for name, value in body.items() if value is not ...})
    return decode_messages(raw, strip_billing_block=strip, counts_only=counts_only)


def asked(**fields: Any) -> dict[str, Any]:
    """Return what the node is asked when a client says *fields*."""
    body: dict[str, Any] = orjson.loads(decoded(**fields).body("node-id"))
    return body


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decoded(**fields)
    return caught.value


def test_a_plain_request_becomes_a_chat_request() -> None:
    assert asked() == {"model": "node-id", "max_tokens": 10, "messages": USER, "stream": False}


def test_sampling_parameters_are_passed_on() -> None:
    body = asked(temperature=0.5, top_p=0.9, top_k=4, stop_sequences=["END"], stream=True)

    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 0.9, 4)
    assert (body["stop"], body["stream"]) == (["END"], True)


def test_a_system_string_becomes_the_first_turn() -> None:
    assert asked(system="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        *USER,
    ]


def test_system_blocks_stay_apart() -> None:
    two = [SYSTEM, {"type": "text", "text": "Be kind."}]

    assert asked(system=two)["messages"][0]["content"] == [
        {"type": "text", "text": "Be brief."},
        {"type": "text", "text": "Be kind."},
    ]


def test_the_billing_block_is_dropped() -> None:
    assert asked(system=[BILLING, SYSTEM])["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize("system", [[BILLING], BILLING["text"], [], ""])
def test_a_system_of_nothing_is_no_turn(system: Any) -> None:
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


def test_text_blocks_are_text() -> None:
    block = {"type": "text", "text": "hi", "citations": None, "cache_control": None}

    assert asked(messages=[{"role": "user", "content": [block]}])["messages"] == USER


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"thinking": {"type": "disabled"}},
        {"thinking": None},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"output_config": {"effort": "high"}},
        {"output_config": {"format": None}},
        {"metadata": {"user_id": "{}"}},
        {"service_tier": "auto"},
        {"safeguards": []},
        {"tools": [], "tool_choice": {"type": "auto"}},
        {"cache_control": {"type": "ephemeral"}},
        {"messages": [{**USER[0], "output_config": {"effort": "low"}}]},
    ],
    ids=str,
)
def test_what_cannot_change_the_tokens_is_accepted(fields: dict[str, Any]) -> None:
    assert asked(**fields) == asked()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"name": "bash"}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"thinking": "yes"}, "thinking"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"messages": [{**USER[0], "id": "x"}]}, "messages.0.id"),
        (
            {"messages": [{**USER[0], "output_config": {"format": {}}}]},
            "messages.0.output_config.format",
        ),
        ({"messages": [*USER, {"role": "assistant", "content": "The"}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system.0"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)

    assert (error.code, error.param) == ("unsupported_parameter", param)
    assert param.split(".", maxsplit=1)[0] in str(error)


@pytest.mark.parametrize(
    "kind", ["image", "document", "tool_use", "tool_result", "thinking", "search_result"]
)
def test_a_block_that_is_not_text_is_refused_by_its_place(kind: str) -> None:
    content = [{"type": "text", "text": "hi"}, {"type": kind}]

    error = refusal(messages=[{"role": "user", "content": content}])

    assert (error.code, error.param) == ("unsupported_parameter", "messages.0.content.1")
    assert repr(kind) in str(error)


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
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
        ),
        ({"temperature": 3}, "temperature"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_refused_with_its_place(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)

    assert (error.status, error.code, error.param) == (400, "invalid_request", param)


def test_counting_needs_no_limit_and_accepts_any_last_turn() -> None:
    turns = [*USER, {"role": "assistant", "content": "yes"}]

    call = decoded(max_tokens=..., messages=turns, counts_only=True)

    assert orjson.loads(call.count_body("node-id")) == {"model": "node-id", "messages": turns}
