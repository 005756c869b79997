"""Calls and results reach a template in the shape that it wants, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.ipc.tools import FunctionCall, ToolCall
from cortex.runtime.chat_template import ChatTemplate

# Each shows turns as [role]content; what they do with calls and results is what differs.

ROLE = "{%- for m in messages %}[{{ m.role }}]"
TEXT = "{{ m.content or '' }}"
OBJECTS = """\
{%- for c in m.tool_calls or [] %}({{ c.id }} {{ c.function.name }}
{%- for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}){% endfor %}"""
AS_TEXT = """\
{%- for c in m.tool_calls or [] %}
    {{- '(' + c.function.name + ' ' + c.function.arguments + ')' }}
{%- endfor %}"""
RESULT = "{% if m.role == 'tool' %}<{{ m.tool_call_id }} {{ m.name }}>{% endif %}"
END = "{% endfor %}"

WHOLE = ROLE + TEXT + OBJECTS + RESULT + END
ARGUMENTS_AS_TEXT = ROLE + TEXT + AS_TEXT + END
NINE_LETTERS = (
    ROLE + TEXT + OBJECTS + RESULT + "{%- for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}{% endfor %}" + END
)
ONE_CALL = ROLE + TEXT + "{% set m = {'tool_calls': (m.tool_calls or [])[:1], 'role': m.role, "
ONE_CALL += "'tool_call_id': m.tool_call_id, 'name': m.name} %}" + OBJECTS + RESULT + END
NO_TEXT_BESIDE = ROLE + "{% if not m.tool_calls %}" + TEXT + "{% endif %}" + OBJECTS + RESULT + END
ALTERNATES = (
    NO_TEXT_BESIDE + "{%- for m in messages %}{% if not loop.first and m.role == 'assistant' "
    "and loop.previtem.role == 'assistant' %}{{ raise_exception('twice') }}{% endif %}{% endfor %}"
)
NULL_CONTENT = ROLE + "{% if m.content is none %}(null){% endif %}" + TEXT + OBJECTS + RESULT + END
EMPTY_CONTENT = ROLE + "{{ m.content + '' }}" + OBJECTS + RESULT + END
SAYS_NONE = ROLE + "{{ m.content }}" + OBJECTS + RESULT + END
NO_RESULTS = ROLE + "{% if m.role != 'tool' %}" + TEXT + "{% endif %}" + OBJECTS + END
CALLS_AS_PYTHON = ROLE + TEXT + "{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}" + END


def call(call_id: str, name: str = "add", arguments: str = '{"a": 1}') -> ToolCall:
    return ToolCall(call_id, FunctionCall(name, arguments))


def calling(*calls: ToolCall, text: str | None = None) -> ChatMessage:
    return ChatMessage("assistant", text, tool_calls=list(calls))


def result(call_id: str | None, text: str = "2", **more: Any) -> ChatMessage:
    return ChatMessage("tool", text, tool_call_id=call_id, **more)


ASK = ChatMessage("user", "sum?")


def render(source: str, *messages: ChatMessage, **more: Any) -> str:
    return ChatTemplate(source, {}).render([ASK, *messages], **more).removeprefix("[user]sum?")


def test_a_call_and_its_result_are_shown_with_their_ids_and_the_results_name() -> None:
    prompt = render(WHOLE, calling(call("c1")), result("c1"))

    assert prompt == "[assistant](c1 add a=1)[tool]2<c1 add>"


def test_a_result_that_has_a_name_keeps_it() -> None:
    assert "<c1 sum>" in render(WHOLE, calling(call("c1")), result("c1", name="sum"))


def test_a_result_of_no_known_call_is_shown_without_a_name() -> None:
    assert render(WHOLE, result("c9")) == "[tool]2<c9 >"
    assert render(WHOLE, result(None)) == "[tool]2< >"


def test_results_in_a_row_keep_their_order() -> None:
    prompt = render(WHOLE, calling(call("c1"), call("c2")), result("c2", "B"), result("c1", "A"))

    assert prompt == "[assistant](c1 add a=1)(c2 add a=1)[tool]B<c2 add>[tool]A<c1 add>"


@pytest.mark.parametrize("arguments", ["", "  ", "{}"])
def test_arguments_may_be_absent(arguments: str) -> None:
    assert render(WHOLE, calling(call("c1", arguments=arguments))) == "[assistant](c1 add)"


def test_arguments_with_raw_newlines_are_understood() -> None:
    prompt = render(WHOLE, calling(call("c1", arguments='{"a": "1\n2"}')))

    assert prompt == "[assistant](c1 add a=1\n2)"


def test_a_template_that_wants_arguments_as_text_gets_json() -> None:
    prompt = render(ARGUMENTS_AS_TEXT, calling(call("c1", arguments='{"a":"é"}')), result("c1"))

    assert prompt == '[assistant](add {"a": "é"})[tool]2'


def test_a_template_that_wants_ids_of_nine_letters_gets_them() -> None:
    prompt = render(NINE_LETTERS, calling(call("call_of_mine")), result("call_of_mine"))

    [_, call_id, _, _, result_id, _] = prompt.replace("<", "(").replace("(", " ").split(" ")
    assert call_id == result_id
    assert len(call_id) == 9


def test_an_id_of_nine_letters_stays_as_it_is() -> None:
    assert "(abcDEF123 add" in render(NINE_LETTERS, calling(call("abcDEF123")))


def test_a_template_of_one_call_a_turn_gets_a_turn_for_each_with_its_result_behind() -> None:
    prompt = render(
        ONE_CALL,
        calling(call("c1"), call("c2"), text="I add. "),
        *(result("c2", "B"), result("c1", "A"), result("c9", "C")),
        ChatMessage("user", "and?"),
    )

    assert prompt == (
        "[assistant]I add. (c1 add a=1)[tool]A<c1 add>"
        "[assistant](c2 add a=1)[tool]B<c2 add>[tool]C<c9 >[user]and?"
    )


def test_text_that_a_template_would_lose_beside_a_call_gets_a_turn_before_it() -> None:
    prompt = render(NO_TEXT_BESIDE, calling(call("c1"), text="I add."), result("c1"))

    assert prompt == "[assistant]I add.[assistant](c1 add a=1)[tool]2<c1 add>"


def test_where_there_is_no_place_for_that_turn_the_text_is_refused() -> None:
    assert render(ALTERNATES, calling(call("c1")), result("c1"))

    with pytest.raises(UnsupportedParameter, match="no place for text beside a call") as refused:
        render(ALTERNATES, calling(call("c1"), text="I add."), result("c1"))

    assert refused.value.param == "messages[1].content"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (NULL_CONTENT, "[assistant](null)(c1 add a=1)"),
        (EMPTY_CONTENT, "[assistant](c1 add a=1)"),
        (SAYS_NONE, "[assistant](c1 add a=1)"),
    ],
)
def test_no_content_is_null_where_the_template_bears_it_and_shows_nothing_of_it(
    template: str, shown: str
) -> None:
    assert render(template, calling(call("c1"))) == shown


@pytest.mark.parametrize("template", [NO_RESULTS, CALLS_AS_PYTHON])
@pytest.mark.parametrize(
    ("message", "place"), [(calling(call("c1")), "tool_calls"), (result("c1"), "role")]
)
def test_a_template_that_would_lose_or_garble_calls_refuses_them_and_names_the_way(
    template: str, message: ChatMessage, place: str
) -> None:
    with pytest.raises(UnsupportedParameter, match='tool_prompt = "hermes"') as refused:
        render(template, message)

    assert refused.value.param == f"messages[1].{place}"


def test_what_the_template_refuses_all_the_same_is_a_400_in_its_words() -> None:
    with pytest.raises(InvalidRequest, match="twice"):
        render(ALTERNATES, ChatMessage("assistant", "a"), ChatMessage("assistant", "b"))


def test_a_system_turn_does_not_come_between_a_call_and_its_result() -> None:
    no_system = WHOLE.replace(
        ROLE, ROLE + "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}", 1
    )

    prompt = render(
        no_system,
        *(calling(call("c1")), ChatMessage("system", "Be brief."), result("c1")),
        ChatMessage("assistant", "two"),
    )

    assert prompt == ("[assistant](c1 add a=1)[tool]2<c1 add>[user]Be brief.[assistant]two")


def test_reasoning_goes_with_the_turn_by_both_names() -> None:
    source = ROLE + "{{ m.reasoning_content }}|{{ m.thinking }}|" + TEXT + END

    prompt = render(source, ChatMessage("assistant", "two", reasoning_content="hm"))

    assert prompt.endswith("[assistant]hm|hm|two")


def test_tools_are_none_where_there_are_none_unless_the_template_must_have_a_list() -> None:
    source = "{% for t in tools %}{{ t.function }}{% endfor %}" + WHOLE

    assert render("{{ tools is none }}" + WHOLE) == "True[user]sum?"
    assert render(source) == ""
