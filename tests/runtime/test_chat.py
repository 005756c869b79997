"""How a model chats: what its template and its operator decide, and what an answer is read by."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.messages import ReasoningBudget
from cortex.ipc.node_api import EMBEDDED_MODEL, LoadRequest, ReasoningParser, ToolParser
from cortex.ipc.openai import ChatMessage
from cortex.runtime import reasoning, tool_formats
from cortex.runtime.chat import ChatOptions
from cortex.runtime.conversation import ReasoningWish
from cortex.runtime.pieces import CallBegins, Reasoning, Text
from tiny_chat import (
    ALWAYS,
    ASK,
    CALLED,
    EFFORTS,
    OPENED,
    PLAIN,
    TOOL,
    TOOLS_AND_THOUGHT,
    UNREAD_CALLS,
    chat,
    ids,
    prompt_of,
    text_of,
    tokenizer,
)

# what the operator may choose


def test_the_names_of_the_parsers_are_those_of_the_api() -> None:
    assert set(get_args(ToolParser)) == {"auto", *tool_formats.FORMATS}
    assert set(get_args(ReasoningParser)) == {"auto", "none", *reasoning.FORMATS}


def test_a_load_says_how_its_model_chats() -> None:
    request = LoadRequest("m", tool_prompt="hermes", tool_parser="llama3", reasoning_parser="seed")

    assert ChatOptions.of(request) == ChatOptions("hermes", "llama3", "seed")


def test_the_embedded_model_gets_its_tools_as_words_unless_told_otherwise() -> None:
    assert ChatOptions.of(LoadRequest(EMBEDDED_MODEL)).tool_prompt == "hermes"
    assert ChatOptions.of(LoadRequest(EMBEDDED_MODEL, tool_prompt="refuse")).tool_prompt == "refuse"
    assert ChatOptions.of(LoadRequest("org/other")).tool_prompt == "auto"


# tools


def test_tools_go_to_a_template_that_shows_them_and_whose_calls_can_be_read() -> None:
    model = chat(TOOLS_AND_THOUGHT)

    prompt = prompt_of(model, ASK, *CALLED, tools=[TOOL])

    assert model.takes_tools
    assert '"description": "Adds."' in text_of(prompt)
    assert '[assistant]<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text_of(
        prompt
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PLAIN, "no place for tools; loaded with tool_prompt"),
        (PLAIN + "{{ tools | tojson }}", "no place for calls of tools and their results; loaded"),
        (UNREAD_CALLS, "a format that this version cannot read; loaded with tool_prompt"),
    ],
)
def test_tools_that_a_template_cannot_express_are_refused_in_words(template: str, why: str) -> None:
    model = chat(template)

    with pytest.raises(UnsupportedParameter, match=why) as refused:
        prompt_of(model, tools=[TOOL])

    assert refused.value.param == "tools"
    assert not model.takes_tools


def test_a_load_that_insists_on_the_template_is_refused_where_that_cannot_be() -> None:
    assert chat(TOOLS_AND_THOUGHT, tool_prompt="template").takes_tools

    with pytest.raises(Unloadable, match="tool_prompt cannot be 'template'") as refused:
        chat(PLAIN, tool_prompt="template")

    assert refused.value.kind == "chat_template_unsupported"


def test_a_format_that_the_operator_names_is_read() -> None:
    model = chat(UNREAD_CALLS, tool_parser="mistral")

    reader = prompt_of(model, tools=[TOOL]).reader()

    [begun, _] = reader.add("[TOOL_CALLS]add[ARGS]{}")
    assert isinstance(begun, CallBegins)


def test_a_model_that_was_loaded_without_tools_refuses_them_and_their_turns() -> None:
    model = chat(TOOLS_AND_THOUGHT, tool_prompt="refuse")

    with pytest.raises(UnsupportedParameter, match='tool_prompt = "refuse"'):
        prompt_of(model, tools=[TOOL])
    with pytest.raises(UnsupportedParameter, match='tool_prompt = "refuse"'):
        prompt_of(model, ASK, *CALLED)
    assert text_of(prompt_of(model)) == "[user]One and one?[assistant]"
    assert not model.takes_tools


@pytest.mark.parametrize("tool", [{}, {"function": {}}, {"function": {"name": 1}}, {"function": 1}])
def test_a_tool_needs_a_name(tool: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="needs a function with a name") as refused:
        prompt_of(chat(TOOLS_AND_THOUGHT), tools=[TOOL, tool])

    assert refused.value.param == "tools[1]"


@pytest.mark.parametrize("tool_prompt", ["auto", "hermes"])
def test_a_tool_that_is_nested_too_deep_is_a_400(tool_prompt: str) -> None:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"items": nested}
    function = {"name": "add", "parameters": nested}

    with pytest.raises(InvalidRequest, match="recursion"):
        prompt_of(
            chat(TOOLS_AND_THOUGHT, tool_prompt=tool_prompt),
            tools=[{"type": "function", "function": function}],
        )


def test_where_no_tools_are_offered_a_call_is_text() -> None:
    reader = prompt_of(chat(TOOLS_AND_THOUGHT)).reader()

    said = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert reader.add(said) == [Text(said)]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="half a surrogate pair") as refused:
        prompt_of(chat(PLAIN), ChatMessage("user", "a\ud800"))

    assert refused.value.param == "messages"


# control tokens


def test_of_control_tokens_those_are_shown_that_a_reader_needs() -> None:
    model = chat(TOOLS_AND_THOUGHT)

    assert prompt_of(model).shown_ids == ids("</think>")
    assert prompt_of(model, tools=[TOOL]).shown_ids == ids("</think>", "<tool_call>")


def test_a_mark_within_a_block_is_shown_too() -> None:
    model = chat(TOOLS_AND_THOUGHT, tool_parser="mistral", reasoning_parser="none")

    assert prompt_of(model, tools=[TOOL]).shown_ids == ids("[TOOL_CALLS]", "[ARGS]")


# reasoning


@pytest.mark.parametrize(
    ("wish", "arguments", "end"),
    [
        (ReasoningWish(), {}, "[assistant]"),
        (ReasoningWish(is_enabled=True), {}, "[assistant]<think>"),
        (ReasoningWish(is_enabled=False), {}, "[assistant]<think></think>"),
        (ReasoningWish(is_enabled=False), {"thinking": True}, "[assistant]<think>"),
    ],
)
def test_the_template_is_told_by_its_own_switch(
    wish: ReasoningWish, arguments: dict[str, Any], end: str
) -> None:
    prompt = prompt_of(chat(TOOLS_AND_THOUGHT), reasoning=wish, template_kwargs=arguments)

    assert text_of(prompt) == f"[user]One and one?{end}"


def test_the_template_is_told_the_nearest_effort_that_it_knows() -> None:
    model = chat(EFFORTS)

    prompt = prompt_of(model, reasoning=ReasoningWish(is_enabled=True, effort="minimal"))

    assert model.takes_effort
    assert "[assistant]low" in text_of(prompt)
    assert prompt.reasoning_budget is None


def budget(tokens: int, *, is_open: bool = False) -> ReasoningBudget:
    begin = [] if is_open else tokenizer().encode("<think>")
    return ReasoningBudget(tokens, tuple(begin), tuple(tokenizer().encode("</think>")))


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (ReasoningWish(), None),
        (ReasoningWish(is_enabled=True), None),
        (ReasoningWish(is_enabled=True, effort="minimal"), budget(512)),
        (ReasoningWish(is_enabled=True, effort="medium"), budget(4096)),
        (ReasoningWish(is_enabled=True, effort="high"), None),
        (ReasoningWish(is_enabled=True, effort="low", budget_tokens=7), budget(7)),
        (ReasoningWish(is_enabled=False), budget(0)),
        (ReasoningWish(is_enabled=False, effort="high", budget_tokens=7), budget(0)),
    ],
)
def test_where_the_template_has_no_word_a_wish_is_a_budget(
    wish: ReasoningWish, expected: ReasoningBudget | None
) -> None:
    assert prompt_of(chat(ALWAYS), reasoning=wish).reasoning_budget == expected


def test_a_block_that_the_prompt_opened_is_reasoning_and_its_budget_begins_at_once() -> None:
    prompt = prompt_of(chat(OPENED), reasoning=ReasoningWish(is_enabled=True, budget_tokens=9))

    assert prompt.reasoning_budget == budget(9, is_open=True)
    assert prompt.reader().add("Hm.</think>Yes.") == [Reasoning("Hm."), Text("Yes.")]


def test_a_block_that_the_prompt_closed_needs_no_budget() -> None:
    prompt = prompt_of(chat(TOOLS_AND_THOUGHT), reasoning=ReasoningWish(is_enabled=False))

    assert prompt.reasoning_budget is None
    assert prompt.reader().add("Yes.") == [Text("Yes.")]


def test_a_model_that_does_not_reason_makes_no_use_of_the_leave_to() -> None:
    model = chat(PLAIN)
    wish = ReasoningWish(is_enabled=True, effort="high", budget_tokens=9)

    prompt = prompt_of(model, reasoning=wish)

    assert not model.reasons
    assert prompt.reasoning_budget is None
    assert prompt.token_ids == prompt_of(model).token_ids
    assert prompt.reader().add("<think>Yes.") == [Text("<think>Yes.")]


# the Hermes format


def test_tools_calls_and_results_become_words_where_the_operator_says_so() -> None:
    model = chat(PLAIN, tool_prompt="hermes")
    system = ChatMessage("system", "Be brief.")
    later = ChatMessage("user", "And two?")
    called = [ChatMessage("assistant", "I add.", tool_calls=CALLED[0].tool_calls), CALLED[1]]

    prompt = prompt_of(model, system, ASK, *called, CALLED[1], later, tools=[TOOL])

    assert model.takes_tools
    head, _, talk = text_of(prompt).partition("[user]")
    assert head.startswith("[system]Be brief.\n\nYou can call tools.")
    assert '\n{"type": "function", "function": {"name": "add", "description": "Adds."' in head
    assert talk == (
        'One and one?[assistant]I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
        "</tool_call>[user]<tool_response>\n2\n</tool_response>\n\n<tool_response>\n2\n"
        "</tool_response>\n\nAnd two?[assistant]"
    )


def test_words_are_read_back_as_calls() -> None:
    prompt = prompt_of(chat(PLAIN, tool_prompt="hermes"), tools=[TOOL])

    [begun, _] = prompt.reader().add('<tool_call>{"name": "add", "arguments": {}}</tool_call>')

    assert isinstance(begun, CallBegins)


def test_without_a_system_turn_the_tools_get_one() -> None:
    prompt = prompt_of(chat(PLAIN, tool_prompt="hermes"), tools=[TOOL])

    assert text_of(prompt).startswith("[system]You can call tools.")


def test_without_tools_nothing_is_added() -> None:
    model = chat(PLAIN, tool_prompt="hermes")

    assert prompt_of(model).token_ids == prompt_of(chat(PLAIN)).token_ids
    assert "<tool_call>" in text_of(prompt_of(model, ASK, *CALLED))


def test_a_template_without_system_turns_gets_the_tools_in_the_users() -> None:
    no_system = PLAIN.replace(
        "[{{ m.role }}]", "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}:"
    )

    prompt = prompt_of(chat(no_system, tool_prompt="hermes"), tools=[TOOL])

    assert text_of(prompt).startswith(":You can call tools.")
    assert text_of(prompt).endswith("\n\nOne and one?[assistant]")
