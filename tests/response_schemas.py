"""What strict clients of Responses check: the schemas of Open Responses, as llm-comply has them.

Its ``response.reasoning.delta`` is OpenAI's ``response.reasoning_text.delta``.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema_rs
from llm_comply.schema import SSE_EVENT_TO_SCHEMA

SPEC = files("llm_comply") / "specs" / "openresponses.json"


def is_response(value: dict[str, Any]) -> None:
    """Fail unless *value* is a response."""
    _validator("ResponseResource").validate(value)


def is_event(value: dict[str, Any]) -> None:
    """Fail unless *value* is an event of the stream of a response."""
    kind = value["type"].replace("reasoning_text.", "reasoning.")
    schema = SSE_EVENT_TO_SCHEMA[kind.replace("summary_text.", "summary.")]
    _validator(schema).validate({**value, "type": kind})


@cache
def _validator(name: str) -> jsonschema_rs.Draft202012Validator:
    spec = json.loads(SPEC.read_text())
    return jsonschema_rs.Draft202012Validator({**spec, "$ref": f"#/components/schemas/{name}"})
