"""What an answer's text must be, as grammars: JSON by a schema, a regular expression, a choice.

    a request says                                      the text is
    response_format  json_object                        a JSON object
                     json_schema                        what the schema says, strict or not
    structured_outputs  json, json_object, regex,       the same; or what the expression matches;
                        choice, grammar                 one of the texts; what the Lark rules derive

A grammar is one that llguidance reads; whether it can be enforced is ``grammar_check.py``'s to say,
what stands around it in an answer ``answer_grammar.py``'s.

Whitespace inside of JSON is what people write, and not without end: at most a line break and 40
further characters at a time, so that a model cannot lose itself in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llguidance
import msgspec

from cortex.ipc.errors import InvalidRequest
from cortex.ipc.openai import ChatCompletionRequest, CompletionRequest
from cortex.ipc.structured import StructuredOutputs
from cortex.runtime.grammar_costs import refuse_costly_rules, refuse_costly_schema

MAX_GRAMMAR_BYTES = 1 << 18
"""Of one schema, and of a whole grammar. Compiling so much takes 0.1 s (2 cores, 2026-11-21)."""

COMPILER = "x-guidance"
"""The keyword by which llguidance is told how to read a schema."""
COMPILER_OPTIONS = {"whitespace_pattern": r"[ \t]?|\r?\n[ \t]{0,40}"}

TEMPERATURE = re.compile(
    r'^[ \t]*[?!]?[\w-]+[ \t]*\[(?:"(?:\\.|[^"\\\n])*"|[^\]"\n])*\btemperature\b', re.MULTILINE
)
"""A rule's attribute, which llguidance reads and leaves to the sampler."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A Lark grammar of something in an answer, and the place in the request that asks for it."""

    lark: str
    place: str


def demand_of(asked: ChatCompletionRequest | CompletionRequest) -> Demand | None:
    """Return what *asked* demands of the text, None for nothing; raise InvalidRequest."""
    if asked.structured_outputs is not None:
        return _structured(asked.structured_outputs)
    form = asked.response_format if isinstance(asked, ChatCompletionRequest) else None
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return Demand(_start(json_rule({"type": "object"}, "response_format")), "response_format")
    place = "response_format.json_schema.schema"
    return Demand(_start(json_rule(form.json_schema.schema, place)), place)


def json_rule(schema: Mapping[str, Any], place: str) -> str:
    """Return the right side of a rule for the JSON that *schema*, from *place*, allows.

    Raise InvalidRequest for one that is too large, too deep or too costly to read.
    """
    if COMPILER in schema:
        raise InvalidRequest(f"{place}: {COMPILER!r} is not taken", param=place)
    refuse_costly_schema(schema, place)
    try:
        text = msgspec.json.encode({**schema, COMPILER: COMPILER_OPTIONS}).decode()
    except RecursionError as exc:
        raise InvalidRequest(f"{place}: the schema is nested too deeply", param=place) from exc
    if len(text) > MAX_GRAMMAR_BYTES:
        raise _too_large(text, place)
    return f"%json {text}"


def literal(text: str) -> str:
    """Return *text* as Lark writes it."""
    return msgspec.json.encode(text).decode()


def _structured(asked: StructuredOutputs) -> Demand:
    [name] = asked.given
    place = f"structured_outputs.{name}"
    match name:
        case "json":
            return Demand(_start(json_rule(_schema(asked.json, place), place)), place)
        case "json_object":
            return Demand(_start(json_rule({"type": "object"}, place)), place)
        case "regex":
            return Demand(_start(f"/{llguidance.regex_to_lark(asked.regex or '', '')}/"), place)
        case "choice":
            return Demand(_start(" | ".join(map(literal, asked.choice or []))), place)
        case _:
            return Demand(_lark(asked.grammar or "", place), place)


def _lark(grammar: str, place: str) -> str:
    """Return *grammar*; raise InvalidRequest for its cost, or what would be ignored."""
    if TEMPERATURE.search(grammar):
        raise InvalidRequest(
            f"{place}: a rule cannot have a temperature; the request has one", param=place
        )
    refuse_costly_rules(grammar, place)
    return grammar


def _schema(given: dict[str, Any] | str | None, place: str) -> dict[str, Any]:
    """Return a schema that may be written as text; raise InvalidRequest."""
    if not isinstance(given, str):
        return given or {}
    if len(given) > MAX_GRAMMAR_BYTES:
        raise _too_large(given, place)
    try:
        schema = msgspec.json.decode(given)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(f"{place}: the text is not JSON: {exc}", param=place) from exc
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{place}: the text is no JSON object", param=place)
    return schema


def _too_large(schema: str, place: str) -> InvalidRequest:
    return InvalidRequest(
        f"{place}: the schema has {len(schema)} characters; at most {MAX_GRAMMAR_BYTES} are taken",
        param=place,
    )


def _start(rule: str) -> str:
    return f"start: {rule}"
