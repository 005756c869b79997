"""Every route of the gateway: its handler, and all that it takes, answers and refuses with.

The application is made of this table, and so is ``/openapi.json`` (``ipc/openapi.py``). A request
of inference may also be refused with what an engine says, which no table has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cortex.gateway import fleet_routes, response_routes, routes, usage_routes
from cortex.gateway.auth import PUBLIC
from cortex.gateway.dialects import message_request, response_request
from cortex.gateway.dialects.anthropic import ANTHROPIC
from cortex.gateway.dialects.dialect import Dialect
from cortex.gateway.dialects.message_request import Turn
from cortex.gateway.dialects.openai import OPENAI
from cortex.gateway.dialects.response_request import ReasoningOptions, TextOptions
from cortex.gateway.errors import dialects_at
from cortex.gateway.shapes import (
    AnthropicModel,
    AnthropicModels,
    ChatCompletionBody,
    CompletionBody,
    CountTokensBody,
    DeletedResponse,
    EmbeddingBody,
    GatewayHealth,
    InputItems,
    InputTokens,
    Message,
    MessageEvent,
    MessagesBody,
    Response,
    ResponseEvent,
    ResponsesBody,
    TokenCount,
)
from cortex.ipc.errors import (
    ApiError,
    Conflict,
    ContextLengthExceeded,
    InsufficientQuota,
    LoadedDifferently,
    MalformedToolCall,
    MissingModelField,
    ModelLoading,
    ModelNotAllowed,
    ModelNotFound,
    NodeFailed,
    NodeTimeout,
    OperatorOnly,
    Overloaded,
    PreviousResponseNotFound,
    PromptTooLongForMemory,
    RateLimitExceeded,
    Recovering,
    ResponseNotFound,
    ShuttingDown,
    Unloadable,
    UnsupportedParameter,
)
from cortex.ipc.fleet_api import (
    DrainAnswer,
    DrainNode,
    FleetView,
    LoadAnswer,
    LoadModel,
    PinAnswer,
    PinModel,
    PlacementView,
    UndrainAnswer,
    UnloadAnswer,
    UnloadModel,
    UnpinAnswer,
    UsageView,
)
from cortex.ipc.node_api import Version
from cortex.ipc.openai import MESSAGE, PARAMETERS, ChatMessage
from cortex.ipc.openai_answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    EmbeddingList,
    ModelEntry,
    ModelList,
)
from cortex.ipc.openapi import OPENAI_ERROR, Envelope, Errors, Interface, Json, Route
from cortex.ipc.requests import Parameters

NAMES_A_MODEL: Errors = (ModelNotFound, ModelNotAllowed)
NODE: Errors = (NodeFailed, NodeTimeout, Overloaded, ModelLoading, Recovering, ShuttingDown)
LOADS: Errors = (*NODE, Conflict, LoadedDifferently, Unloadable)
PROMPT: Errors = (ContextLengthExceeded, PromptTooLongForMemory)
BUDGET: Errors = (RateLimitExceeded, InsufficientQuota)
INFERENCE: Errors = (
    *NAMES_A_MODEL,
    *LOADS,
    *PROMPT,
    *BUDGET,
    MissingModelField,
    UnsupportedParameter,
)
CHANGES: Errors = (*NAMES_A_MODEL, OperatorOnly)

OVERLOADED = 529
COUNT: Json = {"type": "integer", "minimum": 1, "maximum": 999_999_999}
NAME: Json = {"type": "string", "minLength": 1}


def _query(name: str, schema: Json, *, required: bool = False) -> Json:
    return {"name": name, "in": "query", "required": required, "schema": schema}


API_VERSION: Json = {
    "name": "anthropic-version",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
    "description": "with it errors and lists of models are in Anthropic's form",
}
BETA = _query("beta", {"type": "string"})
PAGE = (
    _query("order", {"enum": ["asc", "desc"]}),
    _query("limit", {"type": "integer", "minimum": 1, "maximum": response_routes.MAX_PAGE}),
    _query("after", {"type": "string"}),
)
PAGE_OF_MODELS = (
    API_VERSION,
    _query("limit", COUNT),
    _query("after_id", {"type": "string"}),
    _query("before_id", {"type": "string"}),
    _query("client_version", {"type": "string"}),
)
USAGE = (
    _query("key", {"type": "string"}),
    _query("model", {"type": "string"}),
    _query("since", {"type": "string", "format": "date"}),
)

ANSWERS = (
    Route(
        "POST",
        "/v1/chat/completions",
        routes.completions,
        {200: ChatCompletion},
        name="chat_completions",
        takes=ChatCompletionBody,
        events=ChatCompletionChunk,
        errors=(*INFERENCE, MalformedToolCall),
    ),
    Route(
        "POST",
        "/v1/completions",
        routes.completions,
        {200: Completion},
        takes=CompletionBody,
        events=Completion,
        errors=INFERENCE,
    ),
    Route(
        "POST",
        "/v1/embeddings",
        routes.completions,
        {200: EmbeddingList},
        name="embeddings",
        takes=EmbeddingBody,
        errors=INFERENCE,
    ),
    Route(
        "POST",
        "/v1/messages",
        routes.messages,
        {200: Message},
        takes=MessagesBody,
        events=MessageEvent,
        errors=(*INFERENCE, MalformedToolCall),
        parameters=(API_VERSION, BETA),
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        routes.messages_count_tokens,
        {200: TokenCount},
        takes=CountTokensBody,
        errors=(*NAMES_A_MODEL, *NODE, MissingModelField, UnsupportedParameter),
        parameters=(API_VERSION, BETA),
    ),
    Route(
        "POST",
        "/v1/responses",
        response_routes.create,
        {200: Response},
        name="create_response",
        takes=ResponsesBody,
        events=ResponseEvent,
        errors=(*INFERENCE, MalformedToolCall, PreviousResponseNotFound),
    ),
    Route(
        "POST",
        "/v1/responses/input_tokens",
        response_routes.input_tokens,
        {200: InputTokens},
        takes=ResponsesBody,
        errors=(
            *NAMES_A_MODEL,
            *NODE,
            MissingModelField,
            UnsupportedParameter,
            PreviousResponseNotFound,
        ),
    ),
    Route(
        "GET",
        "/v1/responses/{id}",
        response_routes.show,
        {200: Response},
        name="show_response",
        errors=(ResponseNotFound, UnsupportedParameter),
        parameters=(_query("stream", {"const": "false"}),),
    ),
    Route(
        "DELETE",
        "/v1/responses/{id}",
        response_routes.delete,
        {200: DeletedResponse},
        name="delete_response",
        errors=(ResponseNotFound,),
    ),
    Route(
        "GET",
        "/v1/responses/{id}/input_items",
        response_routes.input_items,
        {200: InputItems},
        errors=(ResponseNotFound,),
        parameters=PAGE,
    ),
    Route(
        "GET",
        "/v1/models",
        routes.models,
        {200: (ModelList, AnthropicModels)},
        parameters=PAGE_OF_MODELS,
    ),
    Route(
        "GET",
        "/v1/models/{id:(?s:.+)}",
        routes.model,
        {200: (ModelEntry, AnthropicModel)},
        errors=NAMES_A_MODEL,
        parameters=(API_VERSION,),
    ),
)
FLEET = (
    Route("GET", "/fleet", fleet_routes.fleet, {200: FleetView}, errors=(OperatorOnly,)),
    Route(
        "GET",
        "/fleet/placement",
        fleet_routes.placement,
        {200: PlacementView},
        errors=(*CHANGES, MissingModelField),
        parameters=(_query("model", NAME, required=True),),
    ),
    Route(
        "POST",
        "/fleet/models/load",
        fleet_routes.load,
        {200: LoadAnswer, 202: LoadAnswer},
        takes=LoadModel,
        errors=(*CHANGES, *LOADS),
    ),
    Route(
        "POST",
        "/fleet/models/unload",
        fleet_routes.unload,
        {200: UnloadAnswer},
        takes=UnloadModel,
        errors=(*CHANGES, *NODE, Conflict),
    ),
    Route(
        "POST",
        "/fleet/models/pin",
        fleet_routes.pin,
        {200: PinAnswer},
        takes=PinModel,
        errors=CHANGES,
    ),
    Route(
        "POST",
        "/fleet/models/unpin",
        fleet_routes.unpin,
        {200: UnpinAnswer},
        takes=PinModel,
        errors=CHANGES,
    ),
    Route(
        "POST",
        "/fleet/nodes/{name}/drain",
        fleet_routes.drain,
        {200: DrainAnswer},
        takes=DrainNode,
        is_body_optional=True,
        errors=(OperatorOnly,),
    ),
    Route(
        "POST",
        "/fleet/nodes/{name}/undrain",
        fleet_routes.undrain,
        {200: UndrainAnswer},
        takes=DrainNode,
        is_body_optional=True,
        errors=(OperatorOnly,),
    ),
    Route(
        "GET",
        "/fleet/usage",
        usage_routes.usage,
        {200: UsageView},
        errors=(OperatorOnly,),
        parameters=USAGE,
    ),
)
ABOUT = (
    Route("GET", "/", routes.health, {200: GatewayHealth}, name="root"),
    Route("HEAD", "/api/hello", routes.health, {200: None}, name="hello"),
    Route("GET", "/health", routes.health, {200: GatewayHealth}),
    Route("GET", "/version", routes.version, {200: Version}),
    Route("GET", "/openapi.json", routes.openapi, {200: dict[str, Any]}),
)


def _anthropic_error(codes: list[str]) -> Json:
    """Return the schema of ``Anthropic.envelope``."""
    error = {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "message": {"type": "string", "minLength": 1},
            "code": {"enum": codes},
            "param": {"type": ["string", "null"]},
        },
        "required": ["type", "message", "code", "param"],
    }
    members = {"type": {"const": "error"}, "error": error, "request_id": {"type": "string"}}
    return {"type": "object", "properties": members, "required": list(members)}


def _anthropic_status(error: type[ApiError]) -> int:
    return OVERLOADED if error is Overloaded else error.status


ENVELOPES: Mapping[Dialect, Envelope] = {
    OPENAI: OPENAI_ERROR,
    ANTHROPIC: Envelope("AnthropicError", _anthropic_error, _anthropic_status),
}


def _completed(route: Route) -> Route:
    """Return *route* with how its errors may come, and whether a key is needed."""
    envelopes = tuple(ENVELOPES[dialect] for dialect in dialects_at(route.path))
    is_public = (route.method, route.path) in PUBLIC
    return replace(route, envelopes=envelopes, is_public=is_public)


def _known(names: frozenset[str]) -> Parameters:
    return Parameters(without_effect=names, neutral={}, unknown="", unsupported="")


CORTEX = Interface(
    "cortex",
    "One address in front of a fleet of machines that serve language models.",
    tuple(_completed(route) for route in (*ANSWERS, *FLEET, *ABOUT)),
    {
        ChatMessage: MESSAGE,
        ChatCompletionBody: PARAMETERS,
        CompletionBody: PARAMETERS,
        EmbeddingBody: PARAMETERS,
        CountTokensBody: message_request.PARAMETERS,
        MessagesBody: message_request.PARAMETERS,
        Turn: _known(message_request.WITHOUT_EFFECT_IN_A_TURN),
        ResponsesBody: response_request.PARAMETERS,
        TextOptions: response_request.TEXT,
        ReasoningOptions: response_request.REASONING,
    },
)
