"""``GET /openapi.json`` of either daemon: what it takes and says, as an OpenAPI 3.1 document.

It is made of what the handlers themselves go by, so that it cannot drift from them:

    Route (of a table of routes)    ─► path, its parameters, and one operation
    msgspec types of its bodies     ─► components.schemas; decoding is validation by the same types
    ``Parameters`` of a dialect     ─► what a request may say beyond its type, and at which values
    ApiError classes                ─► one answer per status, with the codes that it may carry
    Envelope                        ─► how a dialect says an error

A stream is ``text/event-stream``; ``x-event-schema`` names the JSON of its events, for which
OpenAPI 3.1 has no word of its own.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    ForeignPage,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MalformedJson,
    RequestTimeout,
    UnsupportedEncoding,
)
from cortex.ipc.openai import (
    MESSAGE,
    PARAMETERS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from cortex.ipc.requests import Parameters

Json = dict[str, Any]
Errors = tuple[type[ApiError], ...]

EVERYWHERE: Errors = (InvalidRequest, ForeignPage, ExpectationFailed, InternalError)
WITH_A_BODY: Errors = (MalformedJson, RequestTimeout, BodyTooLarge, UnsupportedEncoding)

COMPONENTS = "#/components/schemas/{name}"
JSON = "application/json"
EVENTS = "text/event-stream"
PHRASES = frozenset(HTTPStatus)
"""529, which Anthropic has for what is overloaded, is none of them."""
PATH_PARAMETERS: Mapping[str, Json] = {
    "id": {"type": "string", "minLength": 1, "description": "slashes and colons, escaped or not"},
    "index": {"type": "integer", "minimum": 0, "maximum": 9999},
    "name": {"type": "string", "minLength": 1},
}
OF_OPENAI: Mapping[type, Parameters] = {
    ChatMessage: MESSAGE,
    ChatCompletionRequest: PARAMETERS,
    CompletionRequest: PARAMETERS,
    EmbeddingRequest: PARAMETERS,
    TokenizeRequest: PARAMETERS,
}
"""What may stand in these beyond their own fields, where they take no others."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """How a dialect says an error; its code is at ``error.code`` in every one."""

    name: str
    """Of the component."""
    schema: Callable[[list[str]], Json]
    """Of errors with these codes."""
    status: Callable[[type[ApiError]], int] = lambda error: error.status


def openai_error(codes: list[str]) -> Json:
    """Return the schema of ``ApiError.body``."""
    members: Json = {
        "message": {"type": "string", "minLength": 1},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"], "description": "the place in the request"},
        "code": {"type": "string", "enum": codes},
    }
    error = {"type": "object", "properties": members, "required": list(members)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


OPENAI_ERROR = Envelope("Error", openai_error)


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
    """By status: a type of msgspec, several, or ``Text``; None: no body."""
    takes: Any = None
    """The type of the body."""
    is_body_optional: bool = False
    events: Any = None
    """The type of each event where the answer may be a stream."""
    errors: Errors = field(default=())
    """Beyond ``EVERYWHERE`` and ``WITH_A_BODY``."""
    envelopes: tuple[Envelope, ...] = (OPENAI_ERROR,)
    """In which errors may come."""
    parameters: tuple[Json, ...] = ()
    """Of the query and the head, as OpenAPI has them."""
    is_public: bool = False
    """Whether it is answered without a key."""
    name: str = ""
    """Where several routes share a handler."""

    @property
    def shown_path(self) -> str:
        """The path without the patterns of its parameters."""
        return web.DynamicResource(self.path).canonical

    @property
    def types(self) -> list[Any]:
        """The types of msgspec that it speaks of."""
        answers = itertools.chain.from_iterable(map(_several, self.answers.values()))
        spoken = [self.takes, self.events, *answers]
        return [it for it in spoken if it is not None and not isinstance(it, Text)]

    def definition(self) -> web.RouteDef:
        """Return it as aiohttp wants it."""
        return web.route(self.method, self.path, self.handler)


@dataclass(frozen=True, slots=True)
class Interface:
    """All that a daemon serves on its main port."""

    title: str
    summary: str
    routes: Sequence[Route]
    beside: Mapping[type, Parameters] = field(default_factory=lambda: OF_OPENAI)
    """As ``OF_OPENAI``."""


def document(interface: Interface, version: str) -> bytes:
    """Return the document of *interface*, as JSON."""
    schemas, components = _schemas(interface)
    paths: dict[str, Json] = {}
    for route in interface.routes:
        operations = paths.setdefault(route.shown_path, _path_parameters(route.shown_path))
        operations[route.method.lower()] = _operation(route, schemas)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": interface.title,
                "version": version,
                "summary": interface.summary,
                "license": {"name": "GPL-3.0-only", "identifier": "GPL-3.0-only"},
            },
            "security": [{}, {"bearer": []}, {"x-api-key": []}],
            "paths": paths,
            "components": {
                "schemas": {**components, **_envelopes(interface.routes)},
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }
    )


def _several(types: Any) -> tuple[Any, ...]:
    return types if isinstance(types, tuple) else (types,)


def _schemas(interface: Interface) -> tuple[dict[Any, Json], dict[str, Json]]:
    """Return each route's types as references, and the components that these refer to."""
    types = list(dict.fromkeys(it for route in interface.routes for it in route.types))
    shown, components = msgspec.json.schema_components(types, ref_template=COMPONENTS)
    schemas = dict(zip(types, shown, strict=True))
    for shape, known in interface.beside.items():
        if shape.__name__ in components:
            _add_parameters(components[shape.__name__], known)
    return schemas, components


def _add_parameters(schema: Json, known: Parameters) -> None:
    neutral = {name: {"enum": list(values)} for name, values in known.neutral.items()}
    schema["properties"] = {
        **{name: {} for name in sorted(known.without_effect)},
        **neutral,
        **schema["properties"],
    }
    schema["additionalProperties"] = False


def _path_parameters(path: str) -> Json:
    named = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in PATH_PARAMETERS.items()
        if f"{{{name}}}" in path
    ]
    return {"parameters": named} if named else {}


def _operation(route: Route, schemas: Mapping[Any, Json]) -> Json:
    operation: Json = {
        "operationId": route.name or route.handler.__name__,
        "description": inspect.getdoc(route.handler),
        "responses": {
            **{str(status): _answer(status, route, schemas) for status in route.answers},
            **_refusals(route),
        },
    }
    if route.parameters:
        operation["parameters"] = list(route.parameters)
    if route.is_public:
        operation["security"] = []
    if route.takes is not None:
        operation["requestBody"] = {
            "required": not route.is_body_optional,
            "content": {JSON: {"schema": schemas[route.takes]}},
        }
    return operation


def _answer(status: int, route: Route, schemas: Mapping[Any, Json]) -> Json:
    answer = route.answers[status]
    described: Json = {"description": HTTPStatus(status).phrase}
    if answer is None:
        return described
    content: Json = (
        {answer.media_type: {"schema": {"type": "string"}}}
        if isinstance(answer, Text)
        else {JSON: {"schema": _one_of([schemas[it] for it in _several(answer)])}}
    )
    if route.events is not None:
        errors = [_ref(envelope.name) for envelope in route.envelopes]
        content[EVENTS] = {"x-event-schema": {"anyOf": [schemas[route.events], *errors]}}
    return {**described, "content": content}


def _one_of(schemas: list[Json]) -> Json:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _refusals(route: Route) -> dict[str, Json]:
    """Return the answers of *route* that are errors, by status."""
    found: dict[int, list[tuple[Envelope, list[str]]]] = {}
    for envelope in route.envelopes:
        for status, codes in _codes(_errors(route), envelope.status).items():
            found.setdefault(status, []).append((envelope, codes))
    return {str(status): _refusal(status, found[status]) for status in sorted(found)}


def _codes(errors: Errors, status_of: Callable[[type[ApiError]], int]) -> dict[int, list[str]]:
    codes: dict[int, set[str]] = {}
    for error in errors:
        codes.setdefault(status_of(error), set()).add(error.code)
    return {status: sorted(codes[status]) for status in codes}


def _refusal(status: int, said: list[tuple[Envelope, list[str]]]) -> Json:
    codes = sorted({code for _, codes in said for code in codes})
    phrase = HTTPStatus(status).phrase if status in PHRASES else "Overloaded"
    schema = _one_of([_narrowed(envelope, codes) for envelope, codes in said])
    return {
        "description": f"{phrase}: {', '.join(codes)}",
        "content": {JSON: {"schema": schema}},
    }


def _narrowed(envelope: Envelope, codes: list[str]) -> Json:
    code = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    return {"allOf": [_ref(envelope.name), code]}


def _errors(route: Route) -> Errors:
    key = () if route.is_public else (InvalidApiKey,)
    body = WITH_A_BODY if route.takes is not None else ()
    return (*EVERYWHERE, *key, *body, *route.errors)


def _envelopes(routes: Iterable[Route]) -> dict[str, Json]:
    """Return the components of every envelope, with all its codes."""
    codes: dict[Envelope, set[str]] = {}
    for route in routes:
        for envelope in route.envelopes:
            codes.setdefault(envelope, set()).update(error.code for error in _errors(route))
    return {envelope.name: envelope.schema(sorted(codes[envelope])) for envelope in codes}


def _ref(name: str) -> Json:
    return {"$ref": COMPONENTS.format(name=name)}
