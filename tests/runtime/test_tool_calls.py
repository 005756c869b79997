"""Calls are read as they form, in every format, however the answer is split."""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex.runtime.json_text import JsonText
from cortex.runtime.pieces import (
    CallArguments,
    CallBegins,
    CallMalformed,
    Piece,
    Reasoning,
    Text,
)
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS

OFFERED: dict[str, dict[str, Any]] = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    },
    "write": {"type": "object", "properties": {"text": {"type": "string"}, "to": {}}},
    "now": {},
}

Said = list[tuple[str, ...]]
"""Pieces, those of one kind joined: what they are, and what they say."""


def read(
    form: str, text: str, splits: Iterable[int] = (), *, ended: bool = True
) -> tuple[Said, list[Piece]]:
    """Read *text* cut at *splits*."""
    reader = ToolCallReader(FORMATS[form], OFFERED)
    cuts = [0, *sorted(splits), len(text)]
    pieces = [piece for at, end in pairwise(cuts) for piece in reader.add(text[at:end])]
    pieces += reader.flush(ended=ended)
    return joined(pieces), pieces


def joined(pieces: Sequence[Piece]) -> Said:
    said: Said = []
    for kind, group in groupby(map(_said, pieces), key=lambda one: one[:-1]):
        said.append((*kind, "".join(one[-1] for one in group)))
    return said


def _said(piece: Piece) -> tuple[str, ...]:
    match piece:
        case CallBegins(index, _, name):
            return ("begins", str(index), name)
        case CallArguments(index, text):
            return ("arguments", str(index), text)
        case CallMalformed(index, block):
            return ("malformed", str(index), block)
        case Text(text):
            return ("text", text)
        case Reasoning():
            raise AssertionError(piece)


def call(index: int, name: str, arguments: str) -> Said:
    return [("begins", str(index), name), ("arguments", str(index), arguments)]


def text(said: str) -> Said:
    return [("text", said)]


WHOLE: list[tuple[str, str, Said]] = [
    # hermes
    (
        "hermes",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
        call(0, "add", '{"a": 1, "b": 2}'),
    ),
    (
        "hermes",
        (
            'Let me see.\n\n<tool_call>\n{"name": "now"}\n</tool_call>\n'
            '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n So. '
        ),
        [*text("Let me see."), *call(0, "now", "{}"), *call(1, "add", "{}"), *text("So. ")],
    ),
    (
        "hermes",
        (
            '<tool_call>{"id": 1, "type": null, "arguments": {"a": [1]}, "name": "add", "x": {}}'
            "</tool_call>"
        ),
        call(0, "add", '{"a": [1]}'),
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', call(0, "add", "{}")),
    ("hermes", '<tool_call>{"name": "add", "parameters": ""}</tool_call>', call(0, "add", "{}")),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        call(0, "add", '{"a": 1}'),
    ),
    (
        "hermes",
        '<tool_call>{"name": "write", "arguments": {"text": "a\n</tool_call>"}}</tool_call>',
        call(0, "write", '{"text": "a\\n</tool_call>"}'),
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call> x',
        [
            *call(0, "add", '{"a": 1}'),
            *text("x"),
        ],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": [1</tool_call>',
        call(0, "add", '{"a": [1]}'),
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}', call(0, "add", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', call(0, "add", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "now"', call(0, "now", "{}")),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "now"}</tool_call>',
        [
            *text("<tool_call>"),
            *call(0, "now", "{}"),
        ],
    ),
    (
        "hermes",
        '<tool_call>{"name": "now"}<tool_call>{"name": "now"}',
        [
            *call(0, "now", "{}"),
            *call(1, "now", "{}"),
        ],
    ),
    ("hermes", '<tool_call>{"name": "now"} <b>', [*call(0, "now", "{}"), *text("<b>")]),
    ("hermes", "<tool_call><function=now></function></tool_call>", call(0, "now", "{}")),
    ("hermes", "a <tool_ b <tool_call", text("a <tool_ b <tool_call")),
    # qwen_xml
    (
        "qwen_xml",
        (
            "I add.\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
            "-2\n</parameter>\n</function>\n</tool_call>\n"
        ),
        [*text("I add."), *call(0, "add", '{"a": 1, "b": -2}')],
    ),
    (
        "qwen_xml",
        (
            '<tool_call>\n<function=write>\n<parameter=text>\n\n "q"\\\n</parameter> x\n\n'
            "</parameter>\n<parameter=to>[1]</parameter></function></tool_call>"
        ),
        call(0, "write", '{"text": "\\n \\"q\\"\\\\\\n</parameter> x\\n", "to": [1]}'),
    ),
    ("qwen_xml", "<function=now></function> then", [*call(0, "now", "{}"), *text("then")]),
    ("qwen_xml", "<tool_call><function=now>\n</tool_call>", call(0, "now", "{}")),
    (
        "qwen_xml",
        "<tool_call><function=add><parameter=a>1</parameter></tool_call>",
        call(0, "add", '{"a": 1}'),
    ),
    (
        "qwen_xml",
        "<tool_call><function=add><parameter=a>1</parameter>",
        call(0, "add", '{"a": 1}'),
    ),
    ("qwen_xml", '<tool_call>{"name": "now"}</tool_call>', call(0, "now", "{}")),
    ("qwen_xml", "<tool_call><function=add>", call(0, "add", "{}")),
    # llama3
    ("llama3", '{"name": "add", "parameters": {"a": 1}}', call(0, "add", '{"a": 1}')),
    (
        "llama3",
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}',
        [*call(0, "add", '{"a": 1}'), *call(1, "now", "{}")],
    ),
    (
        "llama3",
        ' \n{"type": "function", "name": "now", "arguments": {}} done',
        [*call(0, "now", "{}"), *text("done")],
    ),
    ("llama3", '{"name": "now"}; and', [*call(0, "now", "{}"), *text("; and")]),
    ("llama3", '{"answer": 4}', text('{"answer": 4}')),
    ("llama3", 'So: {"name": "now"}', text('So: {"name": "now"}')),
    (
        "llama3",
        '{"name": "now"} {"name": "now"}',
        [
            *call(0, "now", "{}"),
            *text('{"name": "now"}'),
        ],
    ),
    ("llama3", "<|python_tag|>print(1)", text("<|python_tag|>print(1)")),
    ("llama3", '{"name": "add", "parameters": {"a": 1}', call(0, "add", '{"a": 1}')),
    # mistral
    (
        "mistral",
        (
            'Yes.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}, '
            '{"name": "now", "arguments": {}}]'
        ),
        [*text("Yes."), *call(0, "add", '{"a": 1}'), *call(1, "now", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}',
        [*call(0, "add", '{"a": 1}'), *call(1, "now", "{}")],
    ),
    ("mistral", "[TOOL_CALLS]now{} bye", [*call(0, "now", "{}"), *text("bye")]),
    ("mistral", '[TOOL_CALLS][{"name": "now"}', call(0, "now", "{}")),
    ("mistral", '[TOOL_CALLS][{"name": "now"}; x', [*call(0, "now", "{}"), *text("; x")]),
    ("mistral", "[TOOL_CALLS][]", text("[TOOL_CALLS][]")),
    ("mistral", "[TOOL_CALLS]two words{}", text("[TOOL_CALLS]two words{}")),
    ("mistral", "[TOOL_CALLS]" + 600 * "x", text("[TOOL_CALLS]" + 600 * "x")),
]


@pytest.mark.parametrize(("form", "answer", "said"), WHOLE)
def test_calls_are_read(form: str, answer: str, said: Said) -> None:
    assert read(form, answer)[0] == said


@pytest.mark.parametrize(("form", "answer", "said"), WHOLE)
def test_the_smallest_split_changes_nothing(form: str, answer: str, said: Said) -> None:
    assert read(form, answer, range(1, len(answer)))[0] == said


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Just words.",
        " \n words \n ",
        "a < b and [TOOL and {x}",
        "<tool_call>",
        "<tool_call>\n{",
        '<tool_call>{"name": "no_such_tool", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"tool": "add"}</tool_call>',
        '<tool_call>{"name": "add" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add",}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "no"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": +1}</tool_call>',
        '<tool_call>{"name": "a\\qb"}</tool_call>',
        "<tool_call><function=no_such_tool><parameter=a>1</parameter></function></tool_call>",
        "<tool_call><function=add>words</function></tool_call>",
        "<tool_call><function=add",
        "<tool_call><function=a\nb></function></tool_call>",
        '{"name": "no_such_tool", "parameters": {}}',
        '{"name": "add", 1}',
        "[TOOL_CALLS]no_such_tool[ARGS]{}",
        "[TOOL_CALLS][1]",
    ],
)
def test_a_block_that_begins_no_call_is_text_to_the_letter(form: str, answer: str) -> None:
    said, _ = read(form, answer)

    assert said == (text(answer) if answer else [])


@pytest.mark.parametrize(
    ("form", "answer", "sent"),
    [
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": x}}</tool_call>', '{"a": '),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1,</tool_call>', '{"a": 1,'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {}, "name": "now"}', "{}"),
        ("hermes", '<tool_call>{"name": "add", "arguments": {}, "arguments": {}}', "{}"),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": {"a": "no end</tool_call>',
            '{"a": "no end</tool_call>',
        ),
        ("qwen_xml", "<tool_call><function=add><parameter=a>1", '{"a": '),
        ("qwen_xml", "<tool_call><function=add><parameter=a>1</parameter", '{"a": '),
        ("llama3", '<|python_tag|>{"name": "add", "parameters": {"a": ]}}', '{"a": '),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": ', '{"a": '),
    ],
)
def test_a_call_that_breaks_after_it_began_is_told_and_its_block_is_kept(
    form: str, answer: str, sent: str
) -> None:
    said, pieces = read(form, "Hi. " + answer)

    assert ("arguments", "0", sent) in said
    [broken] = [piece for piece in pieces if isinstance(piece, CallMalformed)]
    behind = "".join(p.text for p in pieces[pieces.index(broken) :] if isinstance(p, Text))
    assert "Hi." + broken.block + behind == "Hi. " + answer


def test_what_follows_a_broken_call_is_numbered_on() -> None:
    said, _ = read("hermes", '<tool_call>{"name": "add", "arguments": {x<tool_call>{"name": "now"}')

    assert said[-2:] == call(1, "now", "{}")


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1', '{"a": 1'),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}', '{"a": 1}'),
        ("<function=add><parameter=a>1</parameter>", '{"a": '),
    ],
)
def test_a_call_that_was_cut_is_what_came_of_it(answer: str, sent: str) -> None:
    assert read("qwen_xml", answer, ended=False)[0] == call(0, "add", sent)


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_ca'),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "ad'),
    ],
)
def test_what_a_cut_leaves_behind_a_call_in_its_block_is_nothing(form: str, answer: str) -> None:
    assert read(form, answer, ended=False)[0] == call(0, "now", "{}")


def test_a_block_that_was_cut_before_its_call_began_is_text() -> None:
    assert read("hermes", 'Hm.\n<tool_call>\n{"name": "ad', ended=False)[0] == text(
        'Hm.\n<tool_call>\n{"name": "ad'
    )


def test_a_call_begins_with_the_first_character_of_its_arguments() -> None:
    reader = ToolCallReader(FORMATS["hermes"], OFFERED)

    assert reader.add('<tool_call>{"name": "add", "arguments": ') == []
    assert joined(reader.add('{"a')) == call(0, "add", '{"a')
    assert joined(reader.add('": 1')) == [("arguments", "0", '": 1')]


def test_a_text_is_written_as_it_comes() -> None:
    reader = ToolCallReader(FORMATS["qwen_xml"], OFFERED)
    reader.add("<tool_call><function=write><parameter=text>\n")

    assert reader.add('one "two') == [CallArguments(0, 'one \\"two')]
    assert reader.add("\n</para") == []
    assert reader.add("graph>") == [CallArguments(0, "\\n</paragraph>")]


def test_words_are_shown_at_once_and_whitespace_waits_for_what_follows() -> None:
    reader = ToolCallReader(FORMATS["hermes"], OFFERED)

    assert reader.add("One\n") == [Text("One")]
    assert reader.add("two <to") == [Text("\ntwo")]
    assert reader.add("p>") == [Text(" <top>")]


def test_every_call_has_an_id_of_its_own() -> None:
    _, pieces = read("hermes", 2 * '<tool_call>{"name": "now"}</tool_call>')

    ids = {piece.id for piece in pieces if isinstance(piece, CallBegins)}
    assert len(ids) == 2


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=add>", "<function=now>", "</function>"),
        *("<parameter=a>", "<parameter=text>", "</parameter>", "[TOOL_CALLS]", "[ARGS]", "add"),
        *("<|python_tag|>", '{"name": "add", ', '"arguments": ', '"parameters": ', '{"a": 1}'),
        *('{"name": "now"}', "{", "}", "[", "]", ";", ",", '"', "\\", "\n", " ", "1", "<", "x"),
        '<tool_call>{"name": "write", "arguments": {"text": "',
        "<tool_call><function=write><parameter=text>",
    ]
)
ANSWERS = st.lists(FRAGMENTS, max_size=12).map("".join)


@given(st.sampled_from(sorted(FORMATS)), ANSWERS, st.booleans(), st.data())
@example("hermes", '<tool_call>{"name": "now"}\n</tool', True, None)
def test_no_split_changes_what_is_read(form: str, answer: str, ended: bool, data: Any) -> None:
    places = st.sets(st.integers(0, len(answer)))
    splits = data.draw(places) if data else set(range(len(answer)))

    assert read(form, answer, splits, ended=ended)[0] == read(form, answer, ended=ended)[0]


@given(st.sampled_from(sorted(FORMATS)), ANSWERS, st.booleans())
def test_arguments_are_always_the_beginning_of_an_object(
    form: str, answer: str, ended: bool
) -> None:
    said, _ = read(form, answer, range(1, len(answer)), ended=ended)

    broken = {one[1] for one in said if one[0] == "malformed"}
    if not ended:
        broken |= {one[1] for one in said[-1:] if one[0] == "arguments"}  # it may have been cut
    for one in said:
        if one[0] == "arguments" and one[1] in broken:
            judged = JsonText()
            for character in one[2]:
                judged.add(character)
        elif one[0] == "arguments":
            assert isinstance(json.loads(one[2]), dict)


@given(st.sampled_from(sorted(FORMATS)), ANSWERS, st.booleans())
def test_nothing_is_lost_where_no_call_succeeds(form: str, answer: str, ended: bool) -> None:
    said, _ = read(form, answer, ended=ended)

    begun = sum(one[0] == "begins" for one in said)
    broken = sum(one[0] == "malformed" for one in said)
    if begun == broken:
        assert "".join(one[-1] for one in said if one[0] in {"text", "malformed"}) == answer
