"""What reading a grammar costs where llguidance's own limits do not bound it; more is refused.

    what a text or a name has to match              time and memory (2 cores, 2026-11-21)
    several patterns at once (allOf, Lark's ``&``)  grow fourfold with each: 12 take 0.35 s and
                                                    65 MB, 14 take 6 s and 640 MB
    one of several patternProperties                each is compared with each: 200 take 0.8 s

Which patterns meet in one text is llguidance's to find out. Here all different ones of a schema
count, once anything in it says that two schemas hold of one value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cortex.ipc.errors import InvalidRequest

MAX_TOGETHER = 10
"""Patterns and formats that may have to hold at once."""
MAX_NAME_PATTERNS = 64
"""``patternProperties`` of a whole schema."""

SCHEMA = re.compile(r"%json\b\s*")
QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
"""A text or a regular expression in Lark rules."""

_ALTERNATIVES = frozenset({"$ref", "anyOf", "oneOf"})
_ALONE = frozenset(
    {"$comment", "$defs", "$id", "$schema", "default", "definitions", "description", "examples"}
    | {"title", "type"}
)
"""Keywords that demand nothing that could meet a pattern."""


def refuse_costly_schema(schema: Mapping[str, Any], place: str) -> None:
    """Raise InvalidRequest for a schema with too many patterns for one text, or for names."""
    objects = list(_objects(schema))
    names = sum(len(_object(o.get("patternProperties"))) for o in objects)
    if names > MAX_NAME_PATTERNS:
        raise InvalidRequest(
            f"{place}: {names} patternProperties; at most {MAX_NAME_PATTERNS} are taken",
            param=place,
        )
    if any(_joins(o) for o in objects):
        found = {(k, o[k]) for o in objects for k in ("pattern", "format") if _is_text(o.get(k))}
        _refuse_many(len(found), "patterns and formats in schemas that hold together", place)


def refuse_costly_rules(lark: str, place: str) -> None:
    """Raise InvalidRequest for rules that join too many patterns, or hold such a schema."""
    _refuse_many(QUOTED.sub("", lark).count("&"), "patterns joined by '&'", place)
    for found in SCHEMA.finditer(lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, found.end())
        except (ValueError, RecursionError):  # llguidance says what is wrong
            continue
        if isinstance(schema, dict):
            refuse_costly_schema(schema, place)


def _refuse_many(count: int, what: str, place: str) -> None:
    if count > MAX_TOGETHER:
        raise InvalidRequest(
            f"{place}: {count} {what}; at most {MAX_TOGETHER} are taken", param=place
        )


def _joins(schema: Mapping[str, Any]) -> bool:
    """Whether two schemas hold of one value here."""
    return "allOf" in schema or bool(
        schema.keys() & _ALTERNATIVES and len(schema.keys() - _ALONE) > 1
    )


def _objects(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield all JSON objects in *value*, itself too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_text(value: object) -> bool:
    return isinstance(value, str)
