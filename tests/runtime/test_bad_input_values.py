"""Every field of every request, with values of every kind: what the document forbids is refused.

The refusal names the field. What the document allows is answered somehow, and never as a bug.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from at_rest import MODEL, asked, attacked
from cortex.ipc.openapi import document
from cortex.runtime.route_table import NEURON
from fake_node import FakeNode
from raw_http import post, wire

SAID = msgspec.json.decode(document(NEURON, "1"))
SHAPES = {
    path: item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    for path, item in SAID["paths"].items()
    if "post" in item
}
USUAL: dict[str, dict[str, Any]] = {
    "/models/load": {"model_id": MODEL},
    "/models/estimate": {"model_id": MODEL},
    "/models/unload": {"model_id": MODEL},
    "/models/clear_prefix_cache": {"model_id": MODEL},
    "/devices/{index}/restart": {},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
    "/v1/embeddings": {"model": MODEL, "input": "hi"},
    "/tokenize": {"model": MODEL, "prompt": "hi"},
}
VALUES = [
    *("null", "true", "false", "0", "1", "-1", "1.5", "1.0", "-0.0", "1e308", "-1e308", "5e-324"),
    *("2147483647", "2147483648", "9223372036854775807", "9223372036854775808"),
    *("-9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 400),
    *('""', '"x"', '"auto"', '"\\u0000"', '"1"', json.dumps("😀" * 100), json.dumps("x" * 10_000)),
    *("[]", "[null]", "[[]]", '[1, "a"]', '["a", "b"]', "[{}]", "[-1]", "[1e308]", "[2147483648]"),
    *("{}", '{"": ""}', '{"a": {"a": {"a": 1}}}', '{"-1": 1}', '{"0": 1000}', '{"type": "text"}'),
    *("[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200, "[" + "0," * 1000 + "0]"),
]


def fields_of(path: str) -> dict[str, Any]:
    """Return the schemas of the fields that a request to *path* may have."""
    properties: dict[str, Any] = SAID["components"]["schemas"][SHAPES[path].rpartition("/")[2]][
        "properties"
    ]
    return properties


def allows(described: dict[str, Any], value: str) -> bool:
    """Return whether the schema *described* allows *value*, which is JSON."""
    validator = jsonschema_rs.Draft202012Validator({**described, "components": SAID["components"]})
    return validator.is_valid(json.loads(value))


def with_value(path: str, field: str, value: str) -> bytes:
    """Return the body of a usual request to *path*, with *field* set to *value*, which is JSON."""
    usual = {name: json.dumps(said) for name, said in USUAL[path].items()}
    members = {**usual, field: value}
    if path == "/tokenize" and field == "messages":
        del members["prompt"]
    return f"{{{', '.join(f'{json.dumps(k)}: {v}' for k, v in members.items())}}}".encode()


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path in SHAPES for field in fields_of(path)]
)
async def test_a_field_takes_what_the_document_allows_and_nothing_else(
    path: str, field: str
) -> None:
    node = FakeNode(MODEL)
    answers = SAID["paths"][path]["post"]["responses"]

    async with attacked(node) as port, wire(port) as connection:
        for value in VALUES:
            node.models.setdefault(MODEL, FakeNode(MODEL).models[MODEL])
            body = with_value(path, field, value)
            answer = await asked(connection, post(path.replace("{index}", "0"), body))

            said = f"{value[:80]} is answered with {answer.status} {answer.body[:300]!r}"
            assert str(answer.status) in answers, said
            assert answer.status < 500, said
            if not allows(fields_of(path)[field], value):
                assert answer.status == 400, said
                assert str(answer.error["param"]).partition("[")[0].partition(".")[0] == field, said


@pytest.mark.parametrize("path", SHAPES)
async def test_a_field_that_nobody_knows_is_refused_by_its_name(path: str) -> None:
    async with attacked() as port, wire(port) as connection:
        for name in ("nothing", "Model", "model ", "", "\\u0000", "__proto__", "x" * 1000):
            body = with_value(path, "", "1").replace(b'"": 1', f'"{name}": 1'.encode())
            answer = await asked(connection, post(path.replace("{index}", "0"), body))

            assert answer.status == 400, answer
            assert answer.error["code"] in {"unsupported_parameter", "invalid_request"}
            assert name[:20] in answer.error["message"] or "\\u0000" in name
