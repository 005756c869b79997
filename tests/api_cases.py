"""Requests made of the document of an API, by schemathesis, and what an answer must be.

One operation comes in several forms: as the document has it, with the ids of a model and a device
that exist, and without what this model or that does not take; chance alone would find neither.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema_rs
import msgspec
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Err, Ok

from cortex.ipc.openai import PARAMETERS
from cortex.ipc.openapi import document
from cortex.runtime.route_table import NEURON

DEADLINE_SECONDS = 30.0
BUGS = {500, 502, 504}
EVENTS = "text/event-stream"
MOST_EVENTS = 10_000
ONLY_SOME = (
    "chat_template_kwargs",
    "dimensions",
    "previous_response_id",
    "reasoning",
    "stop_token_ids",
    "text",
)
"""Parameters whose values depend on the model, or on earlier answers; so do those that have a
neutral value."""

load_all_checks()
CONFORMS = CHECKS.get_by_names(
    ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)
REFUSES = CHECKS.get_by_names(["negative_data_rejection"])

SAID: dict[str, Any] = msgspec.json.decode(document(NEURON, "1"))
HERE = {"index": 0, "name": "a"}
"""What else a path may name: a device of a neuron, a node of a gateway."""
LAST = {
    "/v1/messages": "event: message_stop",
    "/v1/responses": "event: response.",
}
"""How the last event of a stream begins, where it is not ``[DONE]``."""


def operations(model: str, said: dict[str, Any] = SAID) -> list[tuple[Any, ...]]:
    """Return every operation of the document *said*, in its forms where there is *model*."""
    here = of_this_node(said, model)
    forms = [_operations_of(form) for form in (said, here, of_usual_requests(here))]
    return list(zip(*forms, strict=True))


def name_of(forms: Sequence[Any]) -> str:
    """Return the name of an operation, for the test's."""
    return str(forms[0].label)


def of_this_node(said: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the document *said* with the ids of *model* and of device 0, and no others."""
    said = copy.deepcopy(said)
    for schema in _requests_in(said):
        for name in schema["properties"].keys() & {"model", "model_id"}:
            schema["properties"][name] = {"const": model}
    for item in said["paths"].values():
        for parameter in item.get("parameters", []):
            parameter["schema"] = {"const": HERE.get(parameter["name"], model)}
        for operation in item.keys() - {"parameters"}:
            for parameter in item[operation].get("parameters", []):
                if parameter["name"] == "model":
                    parameter["schema"] = {"const": model}
    return said


def of_usual_requests(said: dict[str, Any]) -> dict[str, Any]:
    """Return the document *said* without what one model or another does not take."""
    said = copy.deepcopy(said)
    schemas = said["components"]["schemas"]
    schemas["ChatMessage"]["properties"] = {
        "role": {"enum": ["system", "user"]},
        "content": {"type": "string"},
    }
    for schema in _requests_in(said):
        for name in schema["properties"].keys() & {*ONLY_SOME, *PARAMETERS.neutral}:
            del schema["properties"][name]
        said_in = {"prompt", "input"} - {"prompt" if "input" in schema["properties"] else ""}
        for name in schema["properties"].keys() & said_in:
            schema["properties"][name] = {"type": "string", "minLength": 1}
            schema["required"] = sorted({*schema["required"], name})
    if "TokenizeRequest" in schemas:
        schemas["TokenizeRequest"]["properties"].pop("messages")
    if "Turn" in schemas:
        schemas["Turn"]["properties"] = {
            "role": {"const": "user"},
            "content": {"type": "string", "minLength": 1},
        }
        schemas["Turn"]["required"] = ["role", "content"]
    return said


def tried(
    forms: Sequence[Any],
    mode: GenerationMode,
    url: str,
    checks: list[Any],
    examples: int,
    *,
    said: dict[str, Any] = SAID,
) -> None:
    """Ask the daemon at *url* many things of one operation of *said*, and look at every answer."""
    cases = st.one_of([form.as_strategy(generation_mode=mode) for form in forms])

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        response = case.call(base_url=url, timeout=DEADLINE_SECONDS)
        assert response.status_code not in BUGS, response.text
        case.validate_response(response, checks=checks)
        if response.headers["content-type"][0].startswith(EVENTS):
            check_events(response.text, case.operation.path, said)

    ask()


def check_events(stream: str, path: str, said: dict[str, Any]) -> None:
    """Fail where an event of *stream* is not as the document *said* has it of *path*."""
    described = said["paths"][path]["post"]["responses"]["200"]["content"][EVENTS]
    validator = jsonschema_rs.Draft202012Validator(
        {**described["x-event-schema"], "components": said["components"]}
    )
    *events, end = stream.split("\n\n")
    assert end == "", stream[-400:]
    assert events[-1].startswith(LAST.get(path, "data: [DONE]")), stream[-400:]
    for event in events:
        data = event.partition("data: ")[2]
        if data not in ("", "[DONE]"):
            validator.validate(msgspec.json.decode(data))


def _operations_of(said: dict[str, Any]) -> list[Any]:
    schema = schemathesis.openapi.from_dict(said)
    schema.config.max_stream_events = MOST_EVENTS
    found = list(schema.get_all_operations())
    assert not [it for it in found if isinstance(it, Err)]
    return [it.ok() for it in found if isinstance(it, Ok)]


def _requests_in(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schemas of the document *said* that take nothing but what they name."""
    for schema in said["components"]["schemas"].values():
        if schema.get("additionalProperties") is False:
            yield schema
