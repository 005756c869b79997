"""What a model writes as plain text becomes the value that the schema wants."""

from typing import Any

import pytest

from cortex.runtime.parameter_values import resolved, takes_only_text, written_value


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "12", "12"),
        ({"type": "integer"}, " 12\n", "12"),
        ({"type": "integer"}, "twelve", '"twelve"'),
        ({"type": "integer"}, "007", '"007"'),
        ({"type": "integer"}, "", '""'),
        ({"type": "number"}, "-1.5e3", "-1.5e3"),
        ({"type": "number"}, "NaN", '"NaN"'),
        ({"type": "boolean"}, "true", "true"),
        ({"type": "boolean"}, "False", "false"),
        ({"type": "boolean"}, "1", '"1"'),
        ({"type": "object"}, '{"a": [1,\n 2]}', '{"a": [1,\n 2]}'),
        ({"type": "object"}, "[1]", '"[1]"'),
        ({"type": "array"}, '["a\nb"]', '["a\\nb"]'),
        ({"type": "array"}, '["a"', '["a"]'),
        ({"type": "integer"}, "null", "null"),
        ({"type": "integer"}, "None", "null"),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": ["string", "null"]}, "nil", '"nil"'),
        ({"type": ["string", "integer"]}, "12", "12"),
        ({"type": ["string", "integer"]}, "null", '"null"'),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]", "[1]"),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "None", "null"),
        ({"enum": [1, 2]}, "2", "2"),
        ({"$ref": "#/$defs/T"}, "[1, 2]", "[1, 2]"),
        (None, "12", "12"),
        (None, "True", '"True"'),
        (None, "null", "null"),
        (None, '"quoted"', '"\\"quoted\\""'),
        (None, 'say "hi"\n', '"say \\"hi\\"\\n"'),
        (None, "é", '"é"'),
        ("nonsense", "12", "12"),
        ({"type": 7}, "12", "12"),
    ],
)
def test_a_text_becomes_the_value_that_the_schema_wants(schema: Any, text: str, value: str) -> None:
    assert written_value(text, schema) == value


@pytest.mark.parametrize("schema", [{"type": "string"}, {"enum": ["a", "b"]}])
def test_a_schema_of_strings_takes_only_text(schema: Any) -> None:
    assert takes_only_text(schema)


@pytest.mark.parametrize("schema", [None, {}, {"type": "integer"}, {"type": ["string", "null"]}])
def test_any_other_schema_takes_more(schema: Any) -> None:
    assert not takes_only_text(schema)


DEFINITIONS: dict[str, Any] = {
    "$defs": {
        "Name": {"type": "string", "title": "Name"},
        "Other": {"$ref": "#/$defs/Name"},
        "Self": {"$ref": "#/$defs/Self"},
        "Odd": 7,
    }
}


@pytest.mark.parametrize(
    ("schema", "meant"),
    [
        ({"$ref": "#/$defs/Name"}, {"type": "string", "title": "Name"}),
        ({"$ref": "#/$defs/Other", "title": "T"}, {"type": "string", "title": "T"}),
        (
            {"anyOf": [{"$ref": "#/$defs/Name"}, {"type": "null"}]},
            {"anyOf": [{"type": "string", "title": "Name"}, {"type": "null"}]},
        ),
        ({"$ref": "#/$defs/Self"}, {"$ref": "#/$defs/Self"}),
        ({"$ref": "#/$defs/Nobody"}, {"$ref": "#/$defs/Nobody"}),
        ({"$ref": "#/$defs/Odd"}, {"$ref": "#/$defs/Odd"}),
        ({"$ref": "#/$defs/Name/type/x"}, {"$ref": "#/$defs/Name/type/x"}),
        ({"$ref": "https://example.com"}, {"$ref": "https://example.com"}),
        ({"$ref": 7}, {"$ref": 7}),
        (True, True),
    ],
)
def test_a_schema_says_itself_what_its_references_say(schema: Any, meant: Any) -> None:
    assert resolved(schema, DEFINITIONS) == meant
