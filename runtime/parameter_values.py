"""A parameter that a model wrote as plain text, as the JSON value that the tool's schema wants.

What does not fit the schema becomes a string: whoever runs the tool says what is wrong with it.

declared            written            becomes
string              12                 "12"
integer or number   12                 12
boolean             true, True         true
null among others   null, None         null
object, array       [1, 2]             [1, 2]
nothing             12, [1], true      as JSON; all else is a string
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cortex.runtime.json_text import json_of

PYTHON = {"True": "true", "False": "false", "None": "null"}
"""How templates that write values with ``| string`` have taught models to write these."""

MAX_REFERENCES = 16
"""From one schema to the next; schemas may refer to themselves."""

KINDS = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}


def takes_only_text(schema: object) -> bool:
    """Whether every text stands for itself."""
    return types_of(schema) == {"string"}


def written_value(text: str, schema: object) -> str:
    """Return the JSON text of the value that *text* stands for."""
    types = types_of(schema)
    value = json_of(PYTHON.get(text.strip(), text) if types else text)
    if value and _fits(KINDS.get(value[0], "number"), types):
        return value
    return json.dumps(text, ensure_ascii=False)


def _fits(kind: str, types: set[str]) -> bool:
    """Whether a value of *kind* is taken as it is written; a string in quotes is not."""
    if kind == "string":
        return False
    if kind == "null":
        return "null" in types or "string" not in types
    wanted = {"number", "integer"} if kind == "number" else {kind}
    return not types or bool(wanted & types)


def types_of(schema: object) -> set[str]:
    """Return the types that *schema* allows; none where it does not say."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {KINDS.get(json.dumps(value)[:1], "number") for value in values}
    options = schema.get("anyOf") or schema.get("oneOf")
    return set().union(*map(types_of, options)) if isinstance(options, list) else set()


def resolved(schema: object, root: Mapping[str, Any]) -> object:
    """Return *schema* with what its references within *root* say, and those of its options."""
    schema = _followed(schema, root)
    if not isinstance(schema, dict):
        return schema
    options = {
        name: [_followed(option, root) for option in schema[name]]
        for name in ("anyOf", "oneOf")
        if isinstance(schema.get(name), list)
    }
    return {**schema, **options}


def _followed(schema: object, root: Mapping[str, Any]) -> object:
    """Return *schema* with what its own references say in their place."""
    for _ in range(MAX_REFERENCES):
        target = _target(schema.get("$ref"), root) if isinstance(schema, dict) else None
        if not isinstance(schema, dict) or not isinstance(target, dict):
            break
        beside = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {**target, **beside}
    return schema


def _target(reference: object, root: Mapping[str, Any]) -> object:
    """Return what ``#/a/b`` points to; None where it is nothing."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: object = root
    for name in reference.removeprefix("#/").split("/"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
