"""Anthropic's published schema, as the wheel of ``llm-comply`` brings it; for tests."""

import importlib.resources
from functools import cache
from typing import Any

import jsonschema_rs
import orjson


@cache
def _components() -> Any:
    spec = importlib.resources.files("llm_comply.specs") / "anthropic.json"
    return orjson.loads(spec.read_bytes())["components"]


@cache
def _validator(name: str) -> jsonschema_rs.Draft202012Validator:
    reference = {"$ref": f"#/components/schemas/{name}", "components": _components()}
    return jsonschema_rs.Draft202012Validator(reference)


def faults(value: Any, name: str) -> list[str]:
    """Return what the schema *name* finds wrong with *value*."""
    found = _validator(name).iter_errors(value)
    return [f"{error.instance_path}: {error.message}" for error in found]


def schema_of(event: str) -> str:
    """Return the name of the schema of an event: ``MessageStartEvent`` for ``message_start``."""
    return "".join(word.title() for word in event.split("_")) + "Event"
