"""Chat templates as they were published: what each can express, and prompts equal the reference's.

Columns of the table: where system turns may stand, and whether a user may have a name; whether it
shows tools; how calls are given to it (arguments as an object or as text, ids of nine characters,
null or empty content of a turn that only calls, one call a turn, where text beside a call goes); in
which format it writes them; its switch for reasoning, its words for an effort, its marks.
"""

from __future__ import annotations

import functools
import json
from datetime import UTC, datetime, tzinfo
from typing import Any

import pytest
from transformers.utils import chat_template_utils

import published
from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.ipc.tools import FunctionCall, ToolCall
from cortex.runtime.chat_messages import turns_of
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.pieces import CallArguments, CallBegins
from cortex.runtime.reasoning import FORMATS, format_of
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS as TOOL_FORMATS

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)

TABLE = """\
template                                       systems         tools  calls                    format    switch           efforts           reasoning
Apertus-8B-Instruct                            first           tools  object/null/beside       -         enable_thinking  -                 -
Apriel-1.6-15b-Thinker-fixed                   anywhere        tools  object/null/beside       -         -                -                 -
Bielik-11B-v3.0-Instruct                       first           tools  object/empty/beside      hermes    enable_thinking  -                 think
ByteDance-Seed-OSS                             anywhere        tools  object/null/beside       -         -                -                 seed
Cohere2MoE                                     anywhere        tools  object/null/before       -         -                -                 -
CohereForAI-c4ai-command-r-plus-tool_use       anywhere        tools  object/empty/beside      -         -                -                 -
CohereForAI-c4ai-command-r7b-12-2024-tool_use  anywhere        tools  object/null/before       -         enable_thinking  -                 -
deepseek-ai-DeepSeek-R1-Distill-Llama-8B       first           -      text/null/before         -         -                -                 think
deepseek-ai-DeepSeek-R1-Distill-Qwen-32B       first           -      object/null/before       -         enable_thinking  -                 think
deepseek-ai-DeepSeek-V3.1                      first           -      object/null/beside       -         enable_thinking  -                 think
deepseek-ai-DeepSeek-V3.2                      first           tools  object/null/beside       -         enable_thinking  -                 think
deepseek-ai-DeepSeek-V4                        first           tools  object/null/beside       -         enable_thinking  -                 think
deepseek-ai-DeepSeek-V4-Flash-0731             first           tools  object/null/beside       -         enable_thinking  high,max          think
fireworks-ai-llama-3-firefunction-v2           refused         -      -                        -         -                -                 -
GigaChat3-10B-A1.8B                            anywhere        tools  object/null/one/beside   -         -                -                 -
GigaChat3.1-10B-A1.8B                          anywhere        tools  object/null/one/beside   -         -                -                 -
GLM-4.6                                        anywhere        tools  object/empty/beside      -         enable_thinking  -                 think
GLM-4.7-Flash                                  anywhere        tools  object/empty/beside      -         enable_thinking  -                 think
google-gemma-2-2b-it                           none            -      -                        -         -                -                 -
google-gemma-4-31B-it                          anywhere        tools  object/null/before       -         enable_thinking  -                 -
google-gemma-4-31B-it-interleaved              anywhere        tools  object/null/before       -         enable_thinking  -                 -
HuggingFaceTB-SmolLM3-3B                       first           -      -                        -         enable_thinking  -                 think
ibm-granite-granite-3.3-2B-Instruct            anywhere        tools  -                        -         thinking         -                 think
ibm-granite-granite-4.0                        anywhere        tools  object/null/beside       hermes    -                -                 -
ibm-granite-granite-4.1                        anywhere        tools  object/null/beside       hermes    -                -                 -
inclusionai-ling-3.0-flash                     anywhere        tools  object/null/beside       -         enable_thinking  -                 think
Kimi-K2-Instruct                               anywhere+names  tools  -                        -         -                -                 -
Kimi-K2-Thinking                               anywhere+names  tools  -                        -         -                -                 think
Kimi-K3                                        anywhere+names  tools  object/null/beside       -         thinking         -                 -
LFM2-8B-A1B                                    anywhere        tools  -                        -         -                -                 -
LFM2.5-8B-A1B                                  anywhere        tools  object/empty/beside      -         -                -                 think
LFM2.5-Instruct                                anywhere        tools  -                        -         -                -                 -
llama-cpp-deepseek-r1                          first           -      object/null/before       -         -                -                 think
llama-cpp-rwkv-world                           first           -      -                        -         enable_thinking  -                 think
meetkai-functionary-medium-v3.1                anywhere        tools  object/null/beside       -         -                -                 -
meetkai-functionary-medium-v3.2                anywhere        tools  text/null/beside         -         -                -                 -
meta-llama-Llama-3.1-8B-Instruct               anywhere        tools  object/null/one/before   llama3    -                -                 -
meta-llama-Llama-3.2-3B-Instruct               anywhere        tools  object/null/one/before   llama3    -                -                 -
meta-llama-Llama-3.3-70B-Instruct              anywhere        tools  object/null/one/before   llama3    -                -                 -
microsoft-Phi-3.5-mini-instruct                anywhere        -      -                        -         -                -                 -
MiMo-VL                                        anywhere        tools  object/null/beside       hermes    -                -                 -
MiniMax-M1                                     first           tools  object/null/before       -         -                -                 -
MiniMax-M2                                     first           tools  object/empty/beside      -         -                -                 think
MiniMax-M3                                     first           tools  object/null/beside       -         -                -                 -
Mistral-Small-3.2-24B-Instruct-2506            first           tools  object/nine/null/alone   mistral   -                -                 -
mistralai-Ministral-3-14B-Reasoning-2512       first           tools  object/empty/beside      mistral   -                -                 mistral
mistralai-Mistral-Nemo-Instruct-2407           first           tools  object/nine/null/alone   mistral   -                -                 -
moonshotai-Kimi-K2                             anywhere        tools  object/null/beside       -         -                -                 -
muse-glimmer                                   anywhere        tools  object/null/before       -         -                -                 -
NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use  anywhere        tools  object/null/before       hermes    -                -                 -
NousResearch-Hermes-3-Llama-3.1-8B-tool_use    anywhere        tools  object/null/before       hermes    -                -                 -
NVIDIA-Nemotron-3-Nano-30B-A3B-BF16            anywhere        tools  object/null/beside       qwen_xml  enable_thinking  -                 think
NVIDIA-Nemotron-Nano-v2                        first           tools  object/null/beside       -         -                -                 think
openai-gpt-oss-120b                            first           tools  object/empty/one/before  -         -                low,medium,high   -
openbmb-MiniCPM5-1B                            anywhere        tools  object/null/beside       -         enable_thinking  -                 think
poolside-Laguna-S-2.1                          anywhere        tools  object/null/beside       -         enable_thinking  -                 think
poolside-Laguna-XS-2.1                         anywhere        tools  object/null/beside       -         enable_thinking  -                 think
poolside-Laguna-XS.2                           anywhere        tools  object/null/beside       -         enable_thinking  -                 think
Qwen-Qwen2.5-7B-Instruct                       anywhere        tools  object/null/beside       hermes    -                -                 -
Qwen-Qwen3-0.6B                                anywhere        tools  object/empty/beside      hermes    enable_thinking  -                 think
Qwen-QwQ-32B                                   anywhere        tools  object/empty/beside      hermes    enable_thinking  -                 think
Qwen3-Coder                                    anywhere        tools  object/null/beside       qwen_xml  -                -                 -
Qwen3.5-4B                                     first           tools  object/null/beside       qwen_xml  enable_thinking  -                 think
Reka-Edge                                      first           tools  object/null/beside       hermes    enable_thinking  -                 think
Spark2.5                                       anywhere        tools  object/null/beside       -         enable_thinking  -                 think
StepFun3.5-Flash                               anywhere        tools  object/null/beside       qwen_xml  -                -                 think
tencent-Hy3                                    first           tools  object/null/beside       -         -                low,high          -
unsloth-Apriel-1.5                             anywhere        tools  object/null/beside       -         -                -                 -
unsloth-mistral-Devstral-Small-2507            anywhere        tools  object/empty/beside      mistral   -                -                 -
upstage-Solar-Open-100B                        first           tools  object/null/before       -         -                minimal,low,high  -
"""  # noqa: E501
PUBLISHED = dict(line.split(maxsplit=1) for line in TABLE.splitlines()[1:])


@functools.cache
def template_of(name: str) -> ChatTemplate:
    source = (published.chat_templates() / f"{name}.jinja").read_text()
    return ChatTemplate(source, SPECIALS, now=lambda: NOW)


def columns_of(name: str) -> list[str]:
    """What the table says of a template, behind its name."""
    return PUBLISHED[name].split()


def found(name: str) -> list[str]:
    """What a template can express, as columns of the table."""
    try:
        template = template_of(name)
    except Unloadable:
        return ["refused", *6 * "-"]
    can, marks = template.expressible, format_of(template.source, "auto")
    calls = "-"
    if can.calls:
        words = {
            "text" if can.calls.arguments_as_text else "object": True,
            "nine": can.calls.nine_letter_ids,
            "null" if can.calls.no_content is None else "empty": True,
            "one": can.calls.one_by_one,
            can.calls.text or "alone": True,
        }
        calls = "/".join(word for word, is_so in words.items() if is_so)
    return [
        "+".join([can.systems, *["parts"] * can.content_as_parts, *["names"] * can.names]),
        "tools" if can.tools else "-",
        calls,
        can.call_format or "-",
        can.switch or "-",
        ",".join(can.efforts) or "-",
        next((word for word, form in FORMATS.items() if form == marks), "-"),
    ]


def test_all_that_were_published_are_here() -> None:
    assert {path.stem for path in published.chat_templates().iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_probe_finds_what_a_template_can_express(name: str) -> None:
    assert found(name) == columns_of(name)


# against the reference

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "How the weather is <now> & then.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name, e.g. Zürich"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        },
    }
]
CITIES = {f"call_{1:024x}": "Köln", f"call_{2:024x}": 'a "b"'}
CALLS = [
    ToolCall(call_id, FunctionCall("get_weather", json.dumps({"city": city, "days": 2})))
    for call_id, city in CITIES.items()
]
RESULTS = [ChatMessage("tool", '{"degrees": 7}', tool_call_id=call.id, name=None) for call in CALLS]
SYSTEM, ASK = ChatMessage("system", "Be <brief>."), ChatMessage("user", "Wie warm ist es? 😀")
ANSWER, NEXT = ChatMessage("assistant", "7 °C."), ChatMessage("user", "And then?\n")
CALLING = ChatMessage("assistant", tool_calls=CALLS[:1], reasoning_content="It asks\nfor Köln.")
BOTH = ChatMessage("assistant", "I look.", tool_calls=CALLS)

CASES: dict[str, tuple[list[ChatMessage], bool]] = {
    "plain": ([SYSTEM, ASK, ANSWER, NEXT], False),
    "offered": ([SYSTEM, ASK], True),
    "called": ([SYSTEM, ASK, CALLING, RESULTS[0], ANSWER, NEXT], True),
    "waiting": ([ASK, CALLING, RESULTS[0]], True),
    "parallel": ([ASK, BOTH, *RESULTS, ANSWER, NEXT], True),
    "later system": ([SYSTEM, ASK, SYSTEM, ANSWER, NEXT], False),
}


class FrozenClock(datetime):
    """The reference's clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> FrozenClock:
        return cls.fromtimestamp(NOW.timestamp(), tz or UTC)


def reference(template: ChatTemplate, turns: list[Any], tools: list[Any], **arguments: Any) -> str:
    """The prompt that transformers makes of *turns*."""
    options: dict[str, Any] = {**SPECIALS, "add_generation_prompt": True, **arguments}
    if not tools and template.expressible.no_tools is not None:
        options["tools"] = []
    if tools:
        options["tools"] = tools
    rendered: Any = chat_template_utils.render_jinja_template(
        [turns], chat_template=template.source, **options
    )
    return str(rendered[0][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_equal_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if columns_of(name)[0] == "refused":
        return
    monkeypatch.setattr(chat_template_utils, "datetime", FrozenClock)
    template = template_of(name)

    rendered: set[str] = set()
    for case, (messages, has_tools) in CASES.items():
        for arguments in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            tools = TOOLS if has_tools and template.expressible.tools else []
            try:
                given = template._given(turns_of(messages))
                prompt = template.render(messages, arguments, tools=tools)
            except (InvalidRequest, UnsupportedParameter):
                continue
            expected = reference(template, given, tools, **arguments)
            assert prompt == expected, case
            rendered.add(case)

    assert rendered >= {"plain", "later system"}
    if template.expressible.calls:
        assert rendered >= {"offered", "called", "waiting"}
        assert ("parallel" in rendered) == (template.expressible.calls.text is not None)


BEGUN = ("7 °C", " 7 °C, ", "7 °C,\n\n", "<think>\nIt asks", "It </think>7")


@pytest.mark.parametrize("name", PUBLISHED)
def test_turns_are_left_open_where_the_reference_leaves_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns_of(name)[0] == "refused":
        return
    monkeypatch.setattr(chat_template_utils, "datetime", FrozenClock)
    template = template_of(name)
    left_open = {"continue_final_message": True, "add_generation_prompt": False}

    for begun in BEGUN:
        messages = [SYSTEM, ASK, ChatMessage("assistant", begun)]
        try:
            expected = reference(template, template._given(turns_of(messages)), [], **left_open)
        except ValueError:
            with pytest.raises(InvalidRequest) as refused:
                template.render(messages, continues_last=True, add_generation_prompt=False)
            assert refused.value.param == "messages[2]"
            continue
        prompt = template.render(messages, continues_last=True, add_generation_prompt=False)
        assert prompt == expected
        assert prompt.rstrip().endswith(begun.strip())


@pytest.mark.parametrize("name", PUBLISHED)
def test_calls_that_a_template_writes_are_read_back(name: str) -> None:
    form = columns_of(name)[3]
    if form == "-":
        return
    asked = [ASK, ChatMessage("assistant", tool_calls=CALLS[:1])]

    prompt = template_of(name).render(asked, tools=TOOLS, add_generation_prompt=False)

    answer = prompt.rpartition("😀")[2]
    if form == "llama3":  # it begins with the call, behind the words that begin the turn
        answer = answer[answer.index("{") :]
    pieces = ToolCallReader(TOOL_FORMATS[form], {"get_weather": {}}).add(answer)
    [begun] = [piece for piece in pieces if isinstance(piece, CallBegins)]
    arguments = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    assert (begun.name, json.loads(arguments)) == ("get_weather", {"city": "Köln", "days": 2})
