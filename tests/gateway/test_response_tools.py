"""Tools of a Responses request, and what calls of them are called."""

from typing import Any

import pytest

from cortex.gateway.dialects.response_tools import choose, offer_of
from cortex.ipc.errors import InvalidRequest, UnsupportedParameter

LS = {"type": "function", "name": "ls", "description": "Lists.", "parameters": {"type": "object"}}
SPAWN = {"type": "function", "name": "spawn", "description": "Starts one.", "strict": False}
AGENTS = {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": [SPAWN]}


def test_a_flat_function_becomes_chats() -> None:
    offer = offer_of([{**LS, "strict": True, "defer_loading": True}])

    assert offer.tools == [
        {
            "type": "function",
            "function": {
                "name": "ls",
                "description": "Lists.",
                "parameters": {"type": "object"},
                "strict": True,
            },
        }
    ]


def test_a_function_is_repeated_with_every_field() -> None:
    assert offer_of([{"type": "function", "name": "ls"}]).shown == [
        {"type": "function", "name": "ls", "description": None, "parameters": None, "strict": None}
    ]


def test_a_function_may_be_nested_as_in_chat() -> None:
    nested = {"type": "function", "function": {"name": "ls"}}

    assert offer_of([nested]).tools == [nested]


def test_a_namespace_is_flattened() -> None:
    (tool,) = offer_of([AGENTS]).tools

    assert tool["function"] == {
        "name": "agents__spawn",
        "description": "Helpers.\n\nStarts one.",
        "strict": False,
    }


def test_a_call_goes_back_into_its_namespace() -> None:
    offer = offer_of([LS, AGENTS])

    assert offer.called("agents__spawn") == {"name": "spawn", "namespace": "agents"}
    assert offer.called("ls") == {"name": "ls"}
    assert offer.called("never__offered") == {"name": "never__offered"}


def test_a_namespace_that_ends_as_names_are_joined_is_not_joined_twice() -> None:
    offer = offer_of([{**AGENTS, "name": "mcp__files__"}])

    assert offer.tools[0]["function"]["name"] == "mcp__files__spawn"


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search", "external_web_access": False},
        {"type": "image_generation", "output_format": "png"},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
        {"type": "local_shell"},
        {"type": "mcp", "server_label": "x"},
        {"type": "of the year after next"},
        {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "x"}]},
        {"type": "namespace", "name": "n"},
        {},
    ],
)
def test_tools_that_nobody_here_could_run_are_left_out(tool: dict[str, Any]) -> None:
    offer = offer_of([tool, LS])

    assert [function.name for function in offer.functions] == ["ls"]


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "function", "name": "no spaces"}, "tools[0].name"),
        ({"type": "function"}, "tools[0].name"),
        ({"type": "function", "name": "f", "parameters": "x"}, "tools[0].parameters"),
        ({"type": "function", "function": "f"}, "tools[0].function"),
        ({"type": "namespace", "tools": []}, "tools[0].name"),
        ({**AGENTS, "tools": [{"type": "function", "name": ""}]}, "tools[0].tools[0].name"),
    ],
)
def test_a_function_that_is_none_is_refused_with_its_place(
    tool: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        offer_of([tool])

    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("none", "none"),
        ("auto", "auto"),
        ("required", "required"),
        (
            {"type": "function", "name": "ls"},
            {"type": "function", "function": {"name": "ls"}},
        ),
        (
            {"type": "function", "name": "spawn", "namespace": "agents"},
            {"type": "function", "function": {"name": "agents__spawn"}},
        ),
    ],
)
def test_a_choice_is_chats(choice: Any, expected: Any) -> None:
    assert choose(offer_of([LS, AGENTS]), choice)[1] == expected


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_the_only_ones_that_are_offered(mode: str) -> None:
    allowed = {
        "type": "allowed_tools",
        "mode": mode,
        "tools": [{"type": "function", "name": "ls"}, {"type": "web_search"}],
    }

    offer, choice = choose(offer_of([AGENTS, LS]), allowed)

    assert choice == mode
    assert [tool["function"]["name"] for tool in offer.tools] == ["ls"]
    assert [tool["name"] for tool in offer.shown] == ["spawn", "ls"]


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("sometimes", "tool_choice"),
        (1, "tool_choice"),
        ({"type": "function", "name": "rm"}, "tool_choice"),
        ({"type": "function", "name": ["ls"]}, "tool_choice"),
        ({"type": "allowed_tools", "mode": "none", "tools": []}, "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "tools": ["ls"]}, "tool_choice.tools"),
    ],
)
def test_a_choice_that_is_none_is_refused(choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        choose(offer_of([LS]), choice)

    assert caught.value.param == param


@pytest.mark.parametrize("kind", ["web_search", "custom", "mcp", None])
def test_a_choice_of_a_tool_that_is_left_out_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(UnsupportedParameter, match="tool_choice"):
        choose(offer_of([LS]), {"type": kind})
