"""What is demanded of a text becomes a grammar; what cannot be enforced is refused by its place."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from cortex.ipc import openai
from cortex.ipc.errors import InvalidRequest
from cortex.runtime.answer_grammar import of_text
from cortex.runtime.grammar_costs import MAX_NAME_PATTERNS, MAX_TOGETHER
from cortex.runtime.structured import MAX_GRAMMAR_BYTES, Demand, demand_of, json_rule
from tiny_grammar import ByteVocabulary, is_over_after, reads, refuse_bad

BYTES = ByteVocabulary("<|end|>", "<|call|>")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def asked(**more: object) -> openai.ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
    return openai.decode_request(msgspec.json.encode(body), openai.ChatCompletionRequest)


def with_schema(schema: object, **more: object) -> dict[str, object]:
    named = {"name": "person", "schema": schema, **more}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def grammar_of(**more: object) -> str:
    """Return the grammar of a request, checked."""
    demand = demand_of(asked(**more))
    assert demand is not None
    grammar = of_text(demand)
    refuse_bad(grammar, BYTES, demand.place)
    return grammar


@pytest.mark.parametrize(
    ("more", "good", "bad"),
    [
        (with_schema(PERSON), '{"name": "Bo", "age": 3}', '{"name": "Bo", "age": "3"}'),
        (with_schema(PERSON), '{"name":"Bo","age":3}', '{"name":"Bo"}'),
        (with_schema(PERSON, strict=True), '{\n  "name": "Bo",\n  "age": 3\n}', "{}"),
        (with_schema(PERSON, strict=False), '{"name": "", "age": -1}', '{"age": 1, "name": ""}'),
        ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
        ({"structured_outputs": {"json": PERSON}}, '{"name": "é", "age": 3}', "{}"),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "12", "1.5"),
        ({"structured_outputs": {"json": {}}}, "[1]", "nothing"),
        ({"structured_outputs": {"json_object": True}}, "{}", "3"),
        ({"structured_outputs": {"regex": r"\d{3}-[a-z]/é"}}, "123-x/é", "12-x/é"),
        ({"structured_outputs": {"regex": "a\nb"}}, "a\nb", "a b"),
        ({"structured_outputs": {"choice": ["yes", "yes and no", 'n"\\o\n']}}, "yes", "no"),
        (
            {"structured_outputs": {"choice": ["yes", "yes and no", 'n"\\o\n']}},
            "yes and no",
            "yesa",
        ),
        ({"structured_outputs": {"choice": ["yes", "yes and no", 'n"\\o\n']}}, 'n"\\o\n', "n"),
        (
            {"structured_outputs": {"grammar": 'start: N ("+" N)*\nN: /[0-9]+/'}},
            "1+22+3",
            "1+",
        ),
        ({"structured_outputs": {"grammar": 'start: <|call|> "x"'}}, "<|call|>x", "x"),
    ],
)
def test_a_text_is_what_is_demanded_and_nothing_else(
    more: dict[str, object], good: str, bad: str
) -> None:
    grammar = grammar_of(**more)

    assert reads(grammar, good, BYTES)
    assert not reads(grammar, bad, BYTES)


@pytest.mark.parametrize("more", [{}, {"response_format": {"type": "text"}}])
def test_a_request_that_demands_nothing_has_no_grammar(more: dict[str, object]) -> None:
    assert demand_of(asked(**more)) is None


def test_an_answer_is_over_with_the_last_brace() -> None:
    assert is_over_after(grammar_of(**with_schema(PERSON)), '{"name": "", "age": 1}', BYTES)


@pytest.mark.parametrize("space", ["  ", "\n\n", "\n" + " " * 41])
def test_nobody_gets_lost_in_whitespace(space: str) -> None:
    grammar = grammar_of(**with_schema(PERSON))

    assert reads(grammar, '{\n                "name": "a", "age": 1}', BYTES)
    assert not reads(grammar, f'{{{space}"name": "a", "age": 1}}', BYTES)


SCHEMA_PLACE = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("more", "place", "words"),
    [
        (with_schema({"type": "strin"}), SCHEMA_PLACE, "Invalid type: strin"),
        (with_schema({"type": "array", "uniqueItems": True}), SCHEMA_PLACE, "uniqueItems"),
        (with_schema({"type": "string", "format": "colour"}), SCHEMA_PLACE, "colour"),
        (with_schema({"type": "string", "pattern": "(?=a)"}), SCHEMA_PLACE, "look-around"),
        (with_schema({"$ref": "https://example.com/s"}), SCHEMA_PLACE, "example.com"),
        (with_schema({"enum": []}), SCHEMA_PLACE, "Unsatisfiable"),
        (with_schema({"x-guidance": {"lenient": True}}), SCHEMA_PLACE, "x-guidance"),
        (with_schema({"enum": ["x" * MAX_GRAMMAR_BYTES]}), SCHEMA_PLACE, "characters"),
        ({"structured_outputs": {"json": '{"type"'}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "no JSON object"),
        (
            {"structured_outputs": {"json": " " * (MAX_GRAMMAR_BYTES + 1)}},
            "structured_outputs.json",
            "characters",
        ),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", "foo"),
        ({"structured_outputs": {"grammar": "start"}}, "structured_outputs.grammar", "."),
        (
            {"structured_outputs": {"grammar": "start: <|nobody|>"}},
            "structured_outputs.grammar",
            "unknown special token",
        ),
        (
            {"structured_outputs": {"grammar": 'start: a\na[temperature=0.2]: "x"'}},
            "structured_outputs.grammar",
            "temperature",
        ),
        (
            {"structured_outputs": {"grammar": "start: start"}},
            "structured_outputs.grammar",
            "no text",
        ),
        ({"structured_outputs": {"grammar": 'start: ""'}}, "structured_outputs.grammar", "no text"),
        *(
            (
                {"structured_outputs": {"grammar": f'start: a\n{rule}temperature=0.2]: "x"'}},
                "structured_outputs.grammar",
                "temperature",
            )
            for rule in ("a [", "?a[", "!a[", 'a[capture="]", ')
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_place_and_in_words(
    more: dict[str, object], place: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as refusal:
        grammar_of(**more)

    assert refusal.value.param == place
    assert len(str(refusal.value)) < 700
    assert "start: %json" not in str(refusal.value)


PATTERNS = [f".*a.{{{n}}}" for n in range(MAX_TOGETHER + 1)]
TOGETHER = {"allOf": [{"pattern": pattern} for pattern in PATTERNS]}
CHAINED = {
    "$defs": {
        f"d{n}": {"pattern": pattern, "$ref": f"#/$defs/d{n + 1}"}
        for n, pattern in enumerate(PATTERNS)
    },
    "$ref": "#/$defs/d0",
}
NESTED: dict[str, Any] = {"type": "string"}
for pattern in PATTERNS:
    NESTED = {"pattern": pattern, "anyOf": [NESTED]}
NAMES: dict[str, Any] = {"patternProperties": {f"^k{n}$": {} for n in range(MAX_NAME_PATTERNS + 1)}}
RULES = "start: A\nA: " + " & ".join(f"/{pattern}/" for pattern in [*PATTERNS, "b"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (with_schema(TOGETHER), "11 patterns and formats"),
        (with_schema({"properties": {"a": {"items": TOGETHER}}}), "11 patterns and formats"),
        (with_schema(CHAINED), "11 patterns and formats"),
        (with_schema(NESTED), "11 patterns and formats"),
        (with_schema(NAMES), "65 patternProperties"),
        ({"structured_outputs": {"grammar": RULES}}, "11 patterns joined"),
        (
            {"structured_outputs": {"grammar": f"start: %json {json.dumps(TOGETHER)}"}},
            "11 patterns and formats",
        ),
    ],
)
def test_what_takes_very_long_to_read_is_refused_unread(
    more: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        demand_of(asked(**more))


@pytest.mark.parametrize(
    "more",
    [
        with_schema({"properties": {f"p{n}": {"pattern": p} for n, p in enumerate(PATTERNS)}}),
        with_schema({"allOf": [{"pattern": "b"}] * 2 * MAX_TOGETHER}),
        {"structured_outputs": {"grammar": 'start: "&&&&&&" /&&&&&&/'}},
        {"structured_outputs": {"grammar": 'start: "a%json {"'}},
    ],
)
def test_patterns_that_do_not_meet_are_no_cost(more: dict[str, object]) -> None:
    grammar_of(**more)


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_schema_that_is_nested_too_deeply_is_refused_by_its_place(depth: int) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}

    with pytest.raises(InvalidRequest, match=r"nested too deeply|recursion") as refusal:
        refuse_bad(of_text(Demand(f"start: {json_rule(schema, 'here')}", "here")), BYTES, "here")

    assert refusal.value.param == "here"


def test_what_llguidance_would_only_warn_of_is_refused() -> None:
    lenient = '{"type": "object", "x-guidance": {"lenient": true}, "not": {}}'
    demand = Demand(f"start: %json {lenient}", "here")

    with pytest.raises(InvalidRequest, match='"not"'):
        refuse_bad(of_text(demand), BYTES, demand.place)
