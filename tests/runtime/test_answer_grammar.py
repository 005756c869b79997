"""A whole answer by its grammar: what it derives, our readers read, and hold to the schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cortex.ipc.errors import InvalidRequest
from cortex.runtime.answer_grammar import of_answer
from cortex.runtime.conversation import CallDemand
from cortex.runtime.pieces import CallArguments, CallBegins, Text
from cortex.runtime.reasoning import FORMATS as REASONING
from cortex.runtime.structured import MAX_GRAMMAR_BYTES, Demand
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS
from cortex.runtime.tool_grammars import OfferedTool
from tiny_grammar import ByteVocabulary, is_over_after, reads, refuse_bad

LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "at": {"type": "string"},
        "times": {"type": "integer"},
        "how": {"enum": ["near", "far"]},
    },
    "required": ["at"],
    "additionalProperties": False,
}
TOOLS = [
    OfferedTool("look", LOOK, "tools[0].function.parameters"),
    OfferedTool("wait", None, "tools[1].function.parameters"),
]
MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "<think>",
    "</think>",
)
PLAIN, CONTROL = ByteVocabulary(), ByteVocabulary(*MARKERS)
NEWER = ByteVocabulary(*MARKERS, "[ARGS]", "[CALL_ID]")
VOCABULARIES = pytest.mark.parametrize("vocabulary", [PLAIN, CONTROL], ids=["text", "tokens"])
FORMS = pytest.mark.parametrize("form", FORMATS)

CALL = {
    "hermes": (
        '<tool_call>\n{"name": "look", "arguments": {"at": "a <b>", "times": 3}}\n</tool_call>'
    ),
    "qwen_xml": (
        "<tool_call>\n<function=look>\n<parameter=at>\na <b>\n</parameter>\n<parameter=times>\n3\n"
        "</parameter>\n</function>\n</tool_call>"
    ),
    "llama3": '{"name": "look", "parameters": {"at": "a <b>", "times": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {"at": "a <b>", "times": 3}}]',
}
EMPTY = {
    "hermes": '<tool_call>{"name": "wait", "arguments": {}}</tool_call>',
    "qwen_xml": "<tool_call><function=wait>\n</function></tool_call>",
    "llama3": '{"name": "wait", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "wait", "arguments": {}}]',
}
TWO = {
    "hermes": f"{CALL['hermes']}\n{EMPTY['hermes']}",
    "qwen_xml": f"{CALL['qwen_xml']}\n{EMPTY['qwen_xml']}",
    "llama3": f"{CALL['llama3']}; {EMPTY['llama3']}",
    "mistral": f"{CALL['mistral'][:-1]}, {EMPTY['mistral'].removeprefix('[TOOL_CALLS][')}",
}
A_NUMBER = Demand("start: /[0-9]+/", "structured_outputs.regex")


def grammar(
    form: str,
    vocabulary: ByteVocabulary,
    calls: CallDemand,
    demand: Demand | None = None,
    *,
    reasoning: str | None = None,
    is_open: bool = False,
) -> str:
    """Return the grammar of an answer, which is none that cannot be enforced."""
    found = of_answer(
        demand,
        calls,
        control_id=vocabulary.control.get,
        call_grammar=FORMATS[form].grammar,
        reasoning=REASONING[reasoning] if reasoning else None,
        is_open=is_open,
    )
    assert found is not None
    refuse_bad(found, vocabulary, "here")
    return found


def forced(*tools: OfferedTool, is_many: bool = True) -> CallDemand:
    return CallDemand(tools or TOOLS, is_forced=True, is_many=is_many)


def read(form: str, text: str) -> tuple[str, list[tuple[str, object]]]:
    """Return the text and the calls that our reader finds."""
    reader = ToolCallReader(FORMATS[form], {"look": LOOK, "wait": {}})
    pieces = [*reader.add(text), *reader.flush(ended=True)]
    names = [piece.name for piece in pieces if isinstance(piece, CallBegins)]
    arguments = [
        "".join(p.text for p in pieces if isinstance(p, CallArguments) and p.index == index)
        for index in range(len(names))
    ]
    said = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    return said, list(zip(names, map(json.loads, arguments), strict=True))


FIRST = ("look", {"at": "a <b>", "times": 3})
SECOND: tuple[str, dict[str, Any]] = ("wait", {})


@FORMS
def test_what_the_grammars_derive_is_what_the_readers_read(form: str) -> None:
    assert read(form, CALL[form]) == ("", [FIRST])
    assert read(form, EMPTY[form]) == ("", [SECOND])
    assert read(form, TWO[form]) == ("", [FIRST, SECOND])


@FORMS
@VOCABULARIES
def test_a_forced_call_is_one_of_the_tools_that_keeps_to_its_schema(
    form: str, vocabulary: ByteVocabulary
) -> None:
    one = grammar(form, vocabulary, forced(is_many=False))

    assert reads(one, CALL[form], vocabulary)
    assert reads(one, EMPTY[form], vocabulary)
    assert is_over_after(one, CALL[form], vocabulary)
    for bad in (CALL[form].replace("look", "see"), CALL[form].replace("at", "to"), "I look."):
        assert not reads(one, bad, vocabulary)
    assert not reads(one, CALL[form].replace("3", "3.5"), vocabulary)


@FORMS
@VOCABULARIES
def test_several_calls_may_follow_each_other_unless_there_shall_be_one(
    form: str, vocabulary: ByteVocabulary
) -> None:
    assert reads(grammar(form, vocabulary, forced()), TWO[form], vocabulary)
    assert not reads(grammar(form, vocabulary, forced(is_many=False)), TWO[form], vocabulary)


@FORMS
def test_a_named_tool_is_the_only_one_that_can_be_called(form: str) -> None:
    named = grammar(form, CONTROL, forced(TOOLS[1], is_many=False))

    assert reads(named, EMPTY[form], CONTROL)
    assert not reads(named, CALL[form], CONTROL)


@FORMS
@VOCABULARIES
def test_reasoning_comes_before_what_is_demanded(form: str, vocabulary: ByteVocabulary) -> None:
    thinks = grammar(form, vocabulary, forced(), reasoning="think")
    has_begun = grammar(form, vocabulary, forced(), reasoning="think", is_open=True)

    block = 'Hm. {"name": <thin </think'
    assert reads(thinks, f"<think>{block}</think>\n\n{CALL[form]}", vocabulary)
    assert reads(thinks, CALL[form], vocabulary)
    assert reads(has_begun, f"{block}</think>{CALL[form]}", vocabulary)
    assert not reads(thinks, f"<think>{block}</think>Yes.", vocabulary)
    assert not reads(thinks, f"<think>{block}", vocabulary)
    assert not reads(has_begun, CALL[form], vocabulary)


@FORMS
@VOCABULARIES
def test_beside_a_strict_tool_any_text_may_come_and_calls_keep_to_their_schemas(
    form: str, vocabulary: ByteVocabulary
) -> None:
    auto = grammar(form, vocabulary, CallDemand(TOOLS))
    before = "" if form == "llama3" else "I look. "

    for good in ("", "I look. {", before + CALL[form], before + TWO[form]):
        assert reads(auto, good, vocabulary), good
    for bad in (CALL[form].replace("look", "see"), CALL[form].replace("at", "to")):
        assert not reads(auto, before + bad, vocabulary), bad


@pytest.mark.parametrize("form", ["hermes", "qwen_xml"])
def test_text_may_follow_a_call(form: str) -> None:
    auto = grammar(form, PLAIN, CallDemand(TOOLS))

    assert reads(auto, f"One: {CALL[form]}\nTwo: {EMPTY[form]} Done.", PLAIN)


def test_of_a_tool_that_is_not_strict_the_arguments_are_any_object() -> None:
    loose = OfferedTool("look", LOOK, "tools[0].function.parameters", is_enforced=False)
    calls = CallDemand([loose, TOOLS[1]])

    for form in ("hermes", "mistral", "llama3"):
        assert reads(grammar(form, CONTROL, calls), CALL[form].replace("at", "to"), CONTROL)
        bad = EMPTY[form].replace("{}", '{"a": 1}')
        assert not reads(grammar(form, CONTROL, calls), bad, CONTROL)
    xml = CALL["qwen_xml"].replace("=at>", "=to>")
    assert reads(grammar("qwen_xml", CONTROL, calls), xml, CONTROL)


@pytest.mark.parametrize("form", ["hermes", "qwen_xml", "mistral"])
def test_beside_tools_a_demanded_text_is_that_text_or_calls(form: str) -> None:
    either = grammar(form, CONTROL, CallDemand(TOOLS), A_NUMBER)

    assert reads(either, "42", CONTROL)
    assert reads(either, TWO[form], CONTROL)
    assert not reads(either, "I look.", CONTROL)
    assert not reads(either, f"42{CALL[form]}", CONTROL)


def test_calls_that_begin_as_json_cannot_be_told_from_a_demanded_text() -> None:
    with pytest.raises(InvalidRequest, match="leave out") as refusal:
        grammar("llama3", CONTROL, CallDemand(TOOLS), A_NUMBER)

    assert refusal.value.param == A_NUMBER.place


def test_a_demanded_text_comes_behind_the_reasoning() -> None:
    found = grammar("hermes", CONTROL, CallDemand(), A_NUMBER, reasoning="think")

    assert reads(found, "<think>40 and 2</think>\n42", CONTROL)
    assert not reads(found, "<think>40 and 2</think>\nforty", CONTROL)


def test_where_nothing_is_demanded_there_is_no_grammar() -> None:
    loose = OfferedTool("look", LOOK, "here", is_enforced=False)

    for calls in (CallDemand(), CallDemand([loose])):
        found = of_answer(
            None,
            calls,
            control_id=CONTROL.control.get,
            call_grammar=FORMATS["hermes"].grammar,
            reasoning=None,
            is_open=False,
        )
        assert found is None


NEWER_CALLS = {
    "[TOOL_CALLS]look[ARGS]{LOOK}": True,
    "[TOOL_CALLS]look[CALL_ID]a1B2c3D4e[ARGS]{LOOK}": True,
    "[TOOL_CALLS]look[ARGS]{LOOK}[TOOL_CALLS]wait[ARGS]{}": True,
    "[TOOL_CALLS]look[CALL_ID]short[ARGS]{LOOK}": False,
    "[TOOL_CALLS]see[ARGS]{LOOK}": False,
    '[TOOL_CALLS][{"name": "look", "arguments": {LOOK}}]': False,
}


@pytest.mark.parametrize("written", NEWER_CALLS)
def test_a_mistral_with_a_token_for_arguments_writes_calls_with_it(written: str) -> None:
    text = written.replace("{LOOK}", '{"at": "a <b>", "times": 3}')

    assert reads(grammar("mistral", NEWER, forced()), text, NEWER) is NEWER_CALLS[written]
    if NEWER_CALLS[written]:
        assert read("mistral", text)[1][0] == FIRST


# Parameters between tags


def xml_call(**written: str) -> str:
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in written.items())
    return f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"


def xml(member: object, **root: object) -> str:
    schema = {"type": "object", "properties": {"k": member}, "required": ["k"], **root}
    return grammar("qwen_xml", PLAIN, forced(OfferedTool("f", schema, "place")))


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("member", "good", "bad"),
    [
        ({"type": "string"}, "any </text>\n\nof lines\n", None),
        ({"type": "string", "title": "K", "default": "x"}, "", None),
        ({}, "any text", None),
        ({"enum": ["near", "far"]}, "far", "nearby"),
        ({"type": "string", "const": "near"}, "near", "far"),
        ({"const": 5}, "5", "6"),
        ({"type": "integer", "minimum": 3}, "3", "2"),
        ({"type": ["number", "null"]}, "null", "none"),
        ({"type": "boolean"}, "true", "yes"),
        (POINT, '{"x": 3}', '{"x": "3"}'),
        ({"type": "array", "items": {"type": "string"}}, '["a", "b"]', "[1]"),
        ({"$ref": "#/$defs/Point"}, '{"x": 3}', '{"x": "3"}'),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, "null", "nil"),
        ({"$ref": "#/$defs/Name"}, "Bo", None),
        ({"$ref": "#/$defs/Points"}, '[{"x": 1}]', '[{"y": 1}]'),
    ],
)
def test_a_parameter_between_tags_keeps_to_its_schema(
    member: object, good: str, bad: str | None
) -> None:
    points = {"type": "array", "items": {"$ref": "#/$defs/Point"}}
    found = xml(member, **{"$defs": {"Point": POINT, "Name": {"type": "string"}, "Points": points}})

    assert reads(found, xml_call(k=good), PLAIN)
    if bad is not None:
        assert not reads(found, xml_call(k=bad), PLAIN)
    assert not reads(found, xml_call(), PLAIN)


def test_parameters_come_in_the_order_of_the_schema_and_optional_ones_may_be_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in "abc"},
        "required": ["b"],
    }
    found = grammar("qwen_xml", PLAIN, forced(OfferedTool("f", schema, "place")))

    assert reads(found, xml_call(a="1", b="2", c="3"), PLAIN)
    assert reads(found, xml_call(b="2"), PLAIN)
    assert not reads(found, xml_call(b="2", a="1"), PLAIN)
    assert not reads(found, xml_call(a="1"), PLAIN)


@pytest.mark.parametrize(
    ("member", "root", "words"),
    [
        ({"type": "string", "pattern": "a+"}, {}, "'pattern'"),
        ({"type": "string", "maxLength": 3}, {}, "'maxLength'"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "pattern": "a"}]}, {}, "'anyOf'"),
        ({"type": ["string", "null"]}, {}, "a text or something else"),
        ({"enum": ["a", 1]}, {}, "a text or something else"),
        ({"not": {}}, {}, "'not'"),
        ({"enum": ["</parameter>"]}, {}, "end tag"),
        (True, {}, "no JSON object"),
        ({}, {"minProperties": 1}, "'minProperties'"),
        ({}, {"required": ["k", "other"]}, "'other'"),
        ({}, {"required": "k"}, "no JSON schema"),
    ],
)
def test_what_cannot_be_forced_between_tags_is_refused_by_its_place(
    member: object, root: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as refusal:
        xml(member, **root)

    assert refusal.value.param is not None
    assert refusal.value.param.startswith("place")


def test_a_block_may_open_with_the_function_in_a_text_with_calls() -> None:
    auto = grammar("qwen_xml", PLAIN, CallDemand(TOOLS))
    call = CALL["qwen_xml"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")

    assert reads(auto, f"So: {call}", PLAIN)
    assert not reads(auto, f"So: {call.replace('=at>', '=to>')}", PLAIN)


def test_schemas_that_are_too_large_together_are_refused() -> None:
    values = ["x" * (MAX_GRAMMAR_BYTES // 3)]
    tools = [OfferedTool(name, {"enum": values}, "place") for name in "abcd"]

    with pytest.raises(InvalidRequest, match="together") as refusal:
        grammar("hermes", PLAIN, forced(*tools))

    assert refusal.value.param == "tools"
