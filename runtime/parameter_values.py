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

from cortex.runtime.json_text import json_of

PYTHON = {"True": "true", "False": "false", "None": "null"}
"""How templates that write values with ``| string`` have taught models to write these."""

KINDS = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}


def takes_only_text(schema: object) -> bool:
    """Whether every text stands for itself."""
    return _types(schema) == {"string"}


def written_value(text: str, schema: object) -> str:
    """Return the JSON text of the value that *text* stands for."""
    types = _types(schema)
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


def _types(schema: object) -> set[str]:
    """Return the types that *schema* allows; none where it does not say."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    values = schema.get("enum")
    if isinstance(values, list):
        return {KINDS.get(json.dumps(value)[:1], "number") for value in values}
    options = schema.get("anyOf") or schema.get("oneOf")
    return set().union(*map(_types, options)) if isinstance(options, list) else set()
