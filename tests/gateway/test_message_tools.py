"""Anthropic's tools, as the functions of a chat request."""

from typing import Any

import pytest
from structlog.typing import EventDict

from anthropic_requests import USER, asked, refusal

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}


def tool(name: str = "Bash", **fields: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": SCHEMA, **fields}


def names(**fields: Any) -> list[str]:
    """Return the functions that the node is told of, in order."""
    return [offered["function"]["name"] for offered in asked(**fields).get("tools", [])]


def change(kind: str, **reference: Any) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": f"tool_{kind}", "tool": reference}]}


def test_a_tool_becomes_a_function() -> None:
    body = asked(tools=[tool(description="Runs a command.")])

    function = {"name": "Bash", "description": "Runs a command.", "parameters": SCHEMA}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert "tool_choice" not in body
    assert "parallel_tool_calls" not in body


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "custom"},
        {"type": "bash_20250124"},
        {"type": None},
        {"cache_control": {"type": "ephemeral"}},
        {"eager_input_streaming": True},
        {"strict": False},
        {"defer_loading": True},
        {"allowed_callers": ["direct", "code_execution_20250825"]},
        {"input_examples": []},
    ],
    ids=str,
)
def test_what_does_not_change_a_function_is_accepted(fields: dict[str, Any]) -> None:
    assert asked(tools=[tool(**fields)]) == asked(tools=[tool()])


def test_a_strict_tool_is_enforced_by_the_node() -> None:
    assert asked(tools=[tool(strict=True)])["tools"][0]["function"]["strict"] is True


def test_examples_stand_in_the_schema() -> None:
    (offered,) = asked(tools=[tool(input_examples=[{"command": "ls"}])])["tools"]

    assert offered["function"]["parameters"] == {**SCHEMA, "examples": [{"command": "ls"}]}


@pytest.mark.parametrize(
    "left_out",
    [
        WEB_SEARCH,
        {"type": "web_fetch_20260318", "name": "web_fetch"},
        {"type": "code_execution_20260521", "name": "code_execution"},
        {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
        {"type": "advisor_20260301", "name": "advisor"},
        {"type": "mcp_toolset", "mcp_server_name": "files"},
        tool("inner", allowed_callers=["code_execution_20250825"]),
    ],
    ids=str,
)
def test_a_tool_that_nobody_runs_here_is_left_out_and_logged(
    left_out: dict[str, Any], logged: list[EventDict]
) -> None:
    assert names(tools=[left_out, tool()]) == ["Bash"]
    (entry,) = logged
    assert entry["tools"] == [left_out.get("name", "files")]


@pytest.mark.parametrize("kind", ["bash_20250124", "computer_20251124", "memory_20250818", "x_1"])
def test_a_tool_that_claude_knows_by_heart_is_refused_by_its_type(kind: str) -> None:
    error = refusal(tools=[tool(), {"type": kind, "name": "bash"}])

    assert (error.code, error.param) == ("unsupported_parameter", "tools.1")
    assert repr(kind) in str(error)


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"name": "Bash"}], "tools.0.input_schema"),
        ([{}], "tools.0.name"),
        ([{"input_schema": {}}], "tools.0.name"),
        ([tool("a b")], "tools.0.name"),
        ([tool(3)], "tools.0.name"),  # type: ignore[arg-type]  # that is the point
        ([tool(), tool("Grep", frobnicate=1)], "tools.1.frobnicate"),
        ([tool(), tool()], "tools.1.name"),
        ([tool(input_schema=[])], "tools.0.input_schema"),
        (["Bash"], "tools[0]"),
        ("Bash", "tools"),
    ],
    ids=str,
)
def test_a_wrong_tool_is_refused_with_its_place(tools: Any, param: str) -> None:
    error = refusal(tools=tools)

    assert (error.code, error.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"type": "auto"}, {}),
        (None, {}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "Bash"},
            {"tool_choice": {"type": "function", "function": {"name": "Bash"}}},
        ),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"parallel_tool_calls": False}),
        ({"type": "auto", "disable_parallel_tool_use": False}, {}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
    ],
    ids=str,
)
def test_the_choice_of_a_tool(choice: Any, said: dict[str, Any]) -> None:
    assert asked(tools=[tool()], tool_choice=choice) == {**asked(tools=[tool()]), **said}


@pytest.mark.parametrize(
    ("choice", "param", "words"),
    [
        ({"type": "tool", "name": "Grep"}, "tool_choice.name", "'Grep' is no tool"),
        ({"type": "tool"}, "tool_choice.name", "None is no tool"),
        ({"type": "tool", "name": "web_search"}, "tool_choice.name", "servers that are not here"),
        ({"type": "all"}, "tool_choice.type", "all"),
        ({"type": "auto", "frobnicate": 1}, "tool_choice.frobnicate", "unknown field"),
        ("auto", "tool_choice", "object"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_refused(choice: Any, param: str, words: str) -> None:
    error = refusal(tools=[tool(), WEB_SEARCH], tool_choice=choice)

    assert (error.code, error.param) == ("invalid_request", param)
    assert words in str(error)


def test_any_tool_needs_a_tool() -> None:
    assert refusal(tools=[WEB_SEARCH], tool_choice={"type": "any"}).param == "tool_choice"


def test_deferred_tools_stand_behind_the_others_in_the_order_they_were_found() -> None:
    offered = [tool(n, defer_loading=n[0] == "d") for n in ("a", "d1", "b", "d2", "d3", "d4")]
    found = [{"type": "tool_reference", "tool_name": n} for n in ("d3", "d2", "d3")]
    result = {"type": "tool_result", "tool_use_id": "t", "content": found}

    before = names(tools=offered)
    after = names(tools=offered, messages=[{"role": "user", "content": [result]}, *USER])

    assert before == ["a", "b", "d1", "d2", "d3", "d4"]
    assert after == ["a", "b", "d3", "d2", "d1", "d4"]


def test_a_tool_that_is_found_later_does_not_move_those_before_it() -> None:
    offered = [tool("a"), tool("d1", defer_loading=True), tool("d2", defer_loading=True)]

    first = names(tools=[offered[0], offered[2]], messages=[change_of("d2"), *USER])
    second = names(tools=offered, messages=[change_of("d2"), change_of("d1"), *USER])

    assert second[: len(first)] == first


def change_of(name: str) -> dict[str, Any]:
    return change("addition", type="tool_reference", name=name)


def test_a_tool_can_be_removed_and_added_again() -> None:
    removal = change("removal", type="tool_reference", name="a")
    offered = [tool("a"), tool("b")]

    assert names(tools=offered, messages=[*USER, removal]) == ["b"]
    assert names(tools=offered, messages=[*USER, removal, change_of("a")]) == ["b", "a"]


def test_what_changes_the_tools_says_nothing_itself() -> None:
    removal = change("removal", type="tool_reference", name="a")

    assert asked(tools=[tool("a")], messages=[*USER, removal])["messages"] == USER


def test_a_tool_can_be_defined_by_a_turn() -> None:
    definition = change("addition", type="tool_definition", definition=tool("c"))
    removal = change("removal", type="tool_reference", name="c")

    assert names(tools=[tool("a")], messages=[*USER, definition]) == ["a", "c"]
    assert names(tools=[tool("a")], messages=[*USER, definition, removal]) == ["a"]


def test_adding_a_tool_that_nobody_runs_here_adds_nothing() -> None:
    assert names(tools=[WEB_SEARCH, tool()], messages=[*USER, change_of("web_search")]) == ["Bash"]


@pytest.mark.parametrize(
    ("turn", "code", "param"),
    [
        (change_of("x"), "invalid_request", "messages.1.content.0.tool"),
        (
            change("addition", type="mcp_tool_reference", server_name="s", name="x"),
            "unsupported_parameter",
            "messages.1.content.0.tool",
        ),
        (
            change("removal", type="tool_definition", definition=tool()),
            "unsupported_parameter",
            "messages.1.content.0.tool",
        ),
        (
            change("addition", type="tool_definition", definition={"name": "x"}),
            "invalid_request",
            "messages.1.content.0.tool.definition.input_schema",
        ),
        (change("addition"), "unsupported_parameter", "messages.1.content.0.tool"),
    ],
    ids=str,
)
def test_a_change_that_cannot_be_made_is_refused_with_its_place(
    turn: dict[str, Any], code: str, param: str
) -> None:
    error = refusal(tools=[tool()], messages=[*USER, turn])

    assert (error.code, error.param) == (code, param)
