"""``GET /openapi.json``: what this neuron takes and says, as an OpenAPI 3.1 document.

It is made of what the handlers themselves go by, so that it cannot drift from them:

    Route (the table in routes.py)  ─► path, its parameters, and one operation
    msgspec types of its bodies     ─► components.schemas; decoding is validation by the same types
    ``Parameters`` of a dialect     ─► what a request may say beyond its type, and at which values
    ApiError classes                ─► one answer per status, with the codes that it may carry

A stream is ``text/event-stream``; ``x-event-schema`` names the JSON of its events, for which
OpenAPI 3.1 has no word of its own.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from cortex.ipc.errors import (
    ApiError,
    BodyTooLarge,
    ExpectationFailed,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MalformedJson,
    RequestTimeout,
    UnsupportedEncoding,
)
from cortex.ipc.openai import MESSAGE, PARAMETERS, ChatMessage, ModelRequest
from cortex.ipc.requests import Parameters

Json = dict[str, Any]
Errors = tuple[type[ApiError], ...]

EVERYWHERE: Errors = (InvalidApiKey, InvalidRequest, ExpectationFailed, InternalError)
WITH_A_BODY: Errors = (MalformedJson, RequestTimeout, BodyTooLarge, UnsupportedEncoding)

COMPONENTS = "#/components/schemas/{name}"
JSON = "application/json"
EVENTS = "text/event-stream"
PATH_PARAMETERS: Mapping[str, Json] = {
    "id": {"type": "string", "minLength": 1, "description": "slashes and colons, escaped or not"},
    "index": {"type": "integer", "minimum": 0, "maximum": 9999},
}


@dataclass(frozen=True, slots=True)
class Text:
    """An answer that is not JSON."""

    media_type: str


@dataclass(frozen=True, slots=True)
class Route:
    """One route: where it is, what it takes, and everything that it may answer."""

    method: str
    path: str
    """A pattern of aiohttp."""
    handler: Handler
    answers: Mapping[int, Any]
    """By status: a type of msgspec, or ``Text``."""
    takes: Any = None
    """The type of the body."""
    is_body_optional: bool = False
    events: Any = None
    """The type of each event where the answer may be a stream."""
    errors: Errors = field(default=())
    """Beyond ``EVERYWHERE`` and ``WITH_A_BODY``."""

    @property
    def shown_path(self) -> str:
        """The path without the patterns of its parameters."""
        return web.DynamicResource(self.path).canonical

    @property
    def types(self) -> list[Any]:
        """The types of msgspec that it speaks of."""
        spoken = [self.takes, self.events, *self.answers.values()]
        return [it for it in spoken if it is not None and not isinstance(it, Text)]

    def definition(self) -> web.RouteDef:
        """Return it as aiohttp wants it."""
        return web.route(self.method, self.path, self.handler)


def document(routes: Sequence[Route], version: str) -> bytes:
    """Return the document of *routes*, as JSON."""
    schemas, components = _schemas(routes)
    paths: dict[str, Json] = {}
    for route in routes:
        operations = paths.setdefault(route.shown_path, _parameters(route.shown_path))
        operations[route.method.lower()] = _operation(route, schemas)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "neuron",
                "version": version,
                "summary": "One host's models.",
                "license": {"name": "GPL-3.0-only", "identifier": "GPL-3.0-only"},
            },
            "security": [{}, {"bearer": []}, {"x-api-key": []}],
            "paths": paths,
            "components": {
                "schemas": {**components, "Error": _error(_every_error(routes))},
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }
    )


def _schemas(routes: Iterable[Route]) -> tuple[dict[Any, Json], dict[str, Json]]:
    """Return each route's types as references, and the components that these refer to."""
    types = list(dict.fromkeys(it for route in routes for it in route.types))
    shown, components = msgspec.json.schema_components(types, ref_template=COMPONENTS)
    schemas = dict(zip(types, shown, strict=True))
    for name, schema in components.items():
        if known := _known_beside(types, name):
            _add_parameters(schema, known)
    return schemas, components


def _known_beside(types: Iterable[Any], name: str) -> Parameters | None:
    """Return what may stand in a *name* beyond its own fields, where it takes no others."""
    if name == ChatMessage.__name__:
        return MESSAGE
    requests = (it for it in types if isinstance(it, type) and issubclass(it, ModelRequest))
    return PARAMETERS if name in {request.__name__ for request in requests} else None


def _add_parameters(schema: Json, known: Parameters) -> None:
    neutral = {name: {"enum": list(values)} for name, values in known.neutral.items()}
    schema["properties"] = {
        **{name: {} for name in sorted(known.without_effect)},
        **neutral,
        **schema["properties"],
    }
    schema["additionalProperties"] = False


def _parameters(path: str) -> Json:
    named = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in PATH_PARAMETERS.items()
        if f"{{{name}}}" in path
    ]
    return {"parameters": named} if named else {}


def _operation(route: Route, schemas: Mapping[Any, Json]) -> Json:
    operation: Json = {
        "operationId": route.handler.__name__,
        "description": inspect.getdoc(route.handler),
        "responses": {
            **{str(status): _answer(status, route, schemas) for status in route.answers},
            **_refusals(route),
        },
    }
    if route.takes is not None:
        operation["requestBody"] = {
            "required": not route.is_body_optional,
            "content": {JSON: {"schema": schemas[route.takes]}},
        }
    return operation


def _answer(status: int, route: Route, schemas: Mapping[Any, Json]) -> Json:
    answer = route.answers[status]
    content: Json = (
        {answer.media_type: {"schema": {"type": "string"}}}
        if isinstance(answer, Text)
        else {JSON: {"schema": schemas[answer]}}
    )
    if route.events is not None:
        content[EVENTS] = {"x-event-schema": {"anyOf": [schemas[route.events], _ref("Error")]}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _refusals(route: Route) -> dict[str, Json]:
    """Return the answers of *route* that are errors, by status."""
    errors = sorted({*_errors(route)}, key=lambda error: (error.status, error.code))
    return {
        str(status): _refusal(status, [error.code for error in group])
        for status, group in itertools.groupby(errors, key=lambda error: error.status)
    }


def _refusal(status: int, codes: list[str]) -> Json:
    code = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}",
        "content": {JSON: {"schema": {"allOf": [_ref("Error"), code]}}},
    }


def _errors(route: Route) -> Errors:
    return EVERYWHERE + (WITH_A_BODY if route.takes is not None else ()) + route.errors


def _every_error(routes: Iterable[Route]) -> list[str]:
    return sorted({error.code for route in routes for error in _errors(route)})


def _error(codes: list[str]) -> Json:
    """Return the schema of ``ApiError.body``."""
    members: Json = {
        "message": {"type": "string", "minLength": 1},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"], "description": "the place in the request"},
        "code": {"type": "string", "enum": codes},
    }
    error = {"type": "object", "properties": members, "required": list(members)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def _ref(name: str) -> Json:
    return {"$ref": COMPONENTS.format(name=name)}
