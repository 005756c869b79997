"""Conversations become prompts as transformers makes them; nothing said is lost."""

from datetime import UTC, datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cortex.ipc.errors import ApiError, InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.ipc.tools import FunctionCall, ToolCall
from cortex.runtime import template_sandbox
from cortex.runtime.chat_template import ChatTemplate

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

SYSTEM_FIRST_ONLY = """\
{%- if messages[0].role == 'system' %}{{ 'S:' + messages[0].content + ';' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ 'U:' + m.content + ';' }}{% endif %}
    {%- if m.role == 'assistant' %}{{ 'A:' + m.content + ';' }}{% endif %}
{%- endfor %}"""

NO_SYSTEM = """\
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
    {{- m.role[0] | upper + ':' + m.content + ';' }}
{%- endfor %}"""

ALTERNATING = """\
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {{- m.role[0] | upper + ':' + m.content + ';' }}
{%- endfor %}"""

PARTS_ONLY = """\
{%- for m in messages %}
    {{- m.role[0] | upper + ':' }}
    {%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
    {{- ';' }}
{%- endfor %}"""


def turn(role: str, content: Any = None, **more: Any) -> ChatMessage:
    return ChatMessage(role=role, content=content, **more)


def call(call_id: str = "c1", name: str = "f", arguments: str = '{"k": 1}') -> ToolCall:
    return ToolCall(call_id, FunctionCall(name, arguments))


def conversation(*said: str) -> list[ChatMessage]:
    """``s:``, ``u:`` and ``a:`` begin a system, a user and an assistant turn."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [turn(roles[text[0]], text[2:]) for text in said]


def render(source: str, messages: list[ChatMessage], **more: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages, **more)


# as transformers does


SPECIAL_VARIABLES = """\
{{ bos_token }}{% for m in messages %}
  {% if m %}
{{ m.content }}{% endif %}
{% endfor %}{{ eos_token }}{{ missing }}{{ tools is none }}{{ documents is none }}"""

JSON = """\
{{ messages | tojson }} {{ messages | tojson(indent=2) }}
{{ {'b': '<é>', 'a': 1} | tojson(separators=(',', ':'), sort_keys=true) }}
{{ 'é' | tojson(ensure_ascii=true) }}"""

LOOPS_AND_BLOCKS = """\
{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}
{% generation %}{{ messages[-1].content }}{% endgeneration %}"""

NAMESPACES_AND_METHODS = """\
{% set ns = namespace(n=0) %}
{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n * 2 }}{{ 2 ** ns.n }}
{{ m['content'] | trim }}{{ m.content.strip().split('\\n')[0] }}{{ '-' * 3 }}{% endfor %}"""


@pytest.mark.parametrize(
    "source", [CHATML, SPECIAL_VARIABLES, JSON, LOOPS_AND_BLOCKS, NAMESPACES_AND_METHODS]
)
def test_prompts_equal_the_references(source: str) -> None:
    messages = [{"role": "user", "content": " hi <b>é\n😀"}, {"role": "assistant", "content": "x"}]
    reference: Any = render_jinja_template(
        [messages], chat_template=source, bos_token="<s>", eos_token="</s>"
    )

    prompt = render(source, [turn(**m) for m in messages], add_generation_prompt=False)

    assert [prompt] == reference[0]


def test_a_template_asks_for_the_answer_unless_told_not_to() -> None:
    assert render(CHATML, conversation("u:hi")).endswith("<|im_start|>assistant\n")
    assert render(CHATML, conversation("u:hi"), add_generation_prompt=False).endswith(
        "<|im_end|>\n"
    )


def test_arguments_of_the_template_pass_through() -> None:
    prompt = render(CHATML, conversation("u:hi"), template_kwargs={"enable_thinking": False})

    assert prompt.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_what_the_template_is_given_anyway_cannot_be_replaced(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        render(CHATML, conversation("u:hi"), template_kwargs={name: "x"})

    assert refused.value.param == f"chat_template_kwargs.{name}"


def test_the_date_is_the_clocks() -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)
    source = "{{ strftime_now('%d %b %Y') }}{{ messages[-1].content }}"

    template = ChatTemplate(source, {}, now=lambda: now)

    assert template.render(conversation("u:hi")) == "21 Nov 2026hi"


# what was said


def test_text_parts_are_joined_with_nothing_between_them() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]

    assert "Hello<|im_end|>" in render(CHATML, [turn("user", parts)])


def test_null_content_is_empty_text() -> None:
    prompt = render(CHATML, [turn("user", "hi"), turn("assistant", None), turn("user", "?")])

    assert "<|im_start|>assistant\n<|im_end|>" in prompt


def test_a_refusal_that_is_replayed_is_part_of_what_was_said() -> None:
    messages = [
        turn("user", "hi"),
        turn("assistant", None, refusal="I won't."),
        turn("assistant", [{"type": "refusal", "refusal": "Never."}]),
    ]

    prompt = render(CHATML, messages)

    assert "assistant\nI won't.<" in prompt
    assert "assistant\nNever.<" in prompt


def test_developer_is_the_newer_name_of_system() -> None:
    assert "<|im_start|>system\nBe brief.<" in render(
        CHATML, [turn("developer", "Be brief."), turn("user", "hi")]
    )


def test_reasoning_is_handed_to_a_template_that_shows_it() -> None:
    source = "{% for m in messages %}[{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"

    messages = [turn("user", "hi"), turn("assistant", "yes", reasoning_content="hm")]

    assert render(source, messages) == "[]hi[hm]yes"


def test_a_speakers_name_is_given_to_a_template_that_shows_it() -> None:
    source = "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}"

    assert render(source, [turn("user", "hi", name="Ada")]) == "Ada:hi"


def test_a_speakers_name_that_the_template_would_lose_is_refused() -> None:
    with pytest.raises(UnsupportedParameter, match="no place for a speaker's name") as refused:
        render(CHATML, [turn("user", "hi"), turn("user", "hi", name="Ada")])

    assert refused.value.param == "messages[1].name"


@pytest.mark.parametrize(
    ("message", "error", "param"),
    [
        (turn("tool", "4", tool_call_id="c1"), UnsupportedParameter, "role"),
        (turn("function", "4"), UnsupportedParameter, "role"),
        (turn("assistant", None, tool_calls=[call()]), UnsupportedParameter, "tool_calls"),
        (turn("user", None, tool_calls=[call()]), InvalidRequest, "tool_calls"),
        (turn("user", "4", tool_call_id="c1"), InvalidRequest, "tool_call_id"),
        (
            turn("assistant", None, tool_calls=[call(arguments="[1]")]),
            InvalidRequest,
            "tool_calls[0].function.arguments",
        ),
        (
            turn("assistant", None, tool_calls=[call(arguments='{"k": ')]),
            InvalidRequest,
            "tool_calls[0].function.arguments",
        ),
        (
            turn("assistant", None, tool_calls=[call(arguments="[" * 100_000)]),
            InvalidRequest,
            "tool_calls[0].function.arguments",
        ),
        (turn("pirate", "arr"), InvalidRequest, "role"),
        (turn("user", [{"type": "image_url"}]), UnsupportedParameter, "content[0].type"),
        (turn("user", [{"type": "file"}]), UnsupportedParameter, "content[0].type"),
        (turn("user", [{"type": "input_audio"}]), UnsupportedParameter, "content[0].type"),
        (turn("user", [{}]), UnsupportedParameter, "content[0].type"),
        (turn("user", [{"type": "text"}]), InvalidRequest, "content[0].text"),
        (turn("user", [{"type": "text", "text": 4}]), InvalidRequest, "content[0].text"),
    ],
)
def test_what_a_prompt_cannot_hold_is_refused_with_its_place(
    message: ChatMessage, error: type[ApiError], param: str
) -> None:
    with pytest.raises(error) as refused:
        render(CHATML, [turn("user", "hi"), message])

    assert refused.value.param == f"messages[1].{param}"


def test_no_tool_calls_at_all_ask_for_nothing() -> None:
    assert "yes" in render(CHATML, [turn("user", "hi"), turn("assistant", "yes", tool_calls=[])])


def test_a_conversation_needs_a_message() -> None:
    with pytest.raises(InvalidRequest, match="at least one message"):
        render(CHATML, [])


def test_a_template_that_refuses_is_a_400_in_its_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as refused:
        render(ALTERNATING, conversation("u:hi", "u:hello?"))

    assert (refused.value.status, refused.value.param) == (400, "messages")


# system turns


def test_a_template_that_takes_system_turns_anywhere_gets_them_there() -> None:
    prompt = render(CHATML, conversation("u:one", "a:two", "s:be brief", "u:three"))

    assert "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthree" in prompt


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["s:a", "u:b"], "S:a;U:b;"),
        (["s:a", "s:b", "u:c"], "S:a\n\nb;U:c;"),
        (["s:a", "u:b", "s:c", "u:d"], "S:a;U:b;U:c\n\nd;"),
        (["s:a", "u:b", "a:c", "s:d", "s:e", "u:f"], "S:a;U:b;A:c;U:d\n\ne\n\nf;"),
        (["u:a", "s:b"], "U:a\n\nb;"),
        (["u:a", "s:b", "a:c"], "U:a\n\nb;A:c;"),
        (["u:a", "a:b", "s:c"], "U:a;A:b;U:c;"),
        (["u:a", "a:b", "s:c", "a:d"], "U:a;A:b;U:c;A:d;"),
    ],
)
def test_a_later_system_turn_that_the_template_would_lose_joins_a_user_turn(
    said: list[str], expected: str
) -> None:
    assert render(SYSTEM_FIRST_ONLY, conversation(*said)) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["s:a", "u:b"], "U:a\n\nb;"),
        (["s:a", "s:b", "u:c", "a:d", "u:e"], "U:a\n\nb\n\nc;A:d;U:e;"),
        (["s:a"], "U:a;"),
        (["s:a", "a:b", "u:c"], "U:a;A:b;U:c;"),
    ],
)
@pytest.mark.parametrize("source", [NO_SYSTEM, ALTERNATING])
def test_a_system_turn_that_the_template_refuses_joins_a_user_turn(
    source: str, said: list[str], expected: str
) -> None:
    assert render(source, conversation(*said)) == expected


def test_a_template_that_takes_only_lists_of_parts_gets_them() -> None:
    assert render(PARTS_ONLY, conversation("u:hi", "a:yes")) == "U:hi;A:yes;"


# not trusted


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "does not compile"),
        ("{{ 'always the same' }}", "does not show what a user says"),
        ("{{ raise_exception('never') }}", "does not show what a user says"),
    ],
)
def test_a_template_that_cannot_say_what_was_said_is_refused_at_load(
    source: str, words: str
) -> None:
    with pytest.raises(Unloadable, match=words) as refused:
        ChatTemplate(source, {})

    assert refused.value.kind == "chat_template_unsupported"


def hostile(attempt: str) -> str:
    """A template that behaves while it is probed."""
    return (
        "{{ messages[-1].content }}{% if not messages[-1].content.startswith('PROBE') %}"
        + attempt
        + "{% endif %}"
    )


@pytest.mark.parametrize(
    "attempt",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__closure__[0] }}",
        "{{ self._TemplateReference__context.parent }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{0.__class__.__mro__}' | format(1) }}{{ ''.__class__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages | map(attribute='__class__.__mro__') | first }}{{ [].__class__.x }}",
        "{{ lipsum.__globals__.os }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace(__class__=1) %}{{ ns.__class__.x }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_nothing_but_what_it_is_given(attempt: str) -> None:
    try:
        prompt = render(hostile(attempt), conversation("u:hi"))
    except InvalidRequest as exc:
        prompt = str(exc)

    assert "<class" not in prompt
    assert "root" not in prompt
    assert "uid=" not in prompt


@pytest.mark.parametrize(
    "attempt",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 * [1] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(10 ** 5) %}{{ 'x' * 10 ** 5 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ 1 / 0 }}",
        "{{ [][1] + {}['x'] }}",
        "{{ missing.attribute }}",
        "{{ 'a' + 1 }}",
        "{{ 'x'.encode('nonsense') }}",
    ],
)
def test_a_template_that_runs_wild_is_a_400(attempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_PROMPT_CHARACTERS", 10**6)

    with pytest.raises(InvalidRequest, match="the model's chat template refuses"):
        render(hostile(attempt), conversation("u:hi"))


def test_a_template_does_not_change_the_callers_messages() -> None:
    messages = conversation("s:a", "u:b", "s:c")

    render(SYSTEM_FIRST_ONLY, messages)

    assert messages == conversation("s:a", "u:b", "s:c")
