"""Every route of a neuron: its handler, and all that it takes, answers and refuses with.

The application is made of this table, and so is ``/openapi.json`` (``ipc/openapi.py``).
"""

from __future__ import annotations

from typing import Any

from cortex.ipc.errors import (
    Conflict,
    ContextLengthExceeded,
    LoadedDifferently,
    MalformedToolCall,
    MissingModelField,
    ModelLoading,
    ModelNotFound,
    NodeFailed,
    Overloaded,
    PromptTooLongForMemory,
    Recovering,
    RouteNotFound,
    ShuttingDown,
    Unloadable,
    UnsupportedParameter,
)
from cortex.ipc.node_api import (
    Capabilities,
    ClearPrefixCacheAnswer,
    ClearPrefixCacheRequest,
    Discovery,
    Endpoint,
    Health,
    LoadAnswer,
    LoadEstimate,
    LoadRequest,
    ModelInfo,
    RestartAnswer,
    RestartRequest,
    UnloadAnswer,
    UnloadRequest,
    Version,
)
from cortex.ipc.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from cortex.ipc.openai_answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    EmbeddingList,
    ModelEntry,
    ModelList,
    Tokenized,
)
from cortex.ipc.openapi import Errors, Interface, Route, Text
from cortex.runtime import routes

ID = "{id:(?s:.+)}"
"""Model ids hold slashes and colons, escaped or not, and whatever else somebody asks for."""

NOT_LOADED: Errors = (ModelNotFound, ModelLoading, Recovering)
CANNOT_NOW: Errors = (Overloaded, ShuttingDown)
NAMES_A_MODEL: Errors = (MissingModelField, UnsupportedParameter)
TOO_LONG: Errors = (ContextLengthExceeded, PromptTooLongForMemory)
INFERENCE: Errors = (*NAMES_A_MODEL, *NOT_LOADED, *CANNOT_NOW, *TOO_LONG, NodeFailed)

NEURON = Interface(
    "neuron",
    "One host's models.",
    (
        Route("GET", "/health", routes.health, {200: Health}),
        Route("GET", "/discovery", routes.discovery, {200: Discovery}),
        Route("GET", "/version", routes.get_version, {200: Version}),
        Route("GET", "/metrics", routes.get_metrics, {200: Text("text/plain")}),
        Route("GET", "/openapi.json", routes.openapi, {200: dict[str, Any]}),
        Route("GET", "/models", routes.models, {200: list[ModelInfo]}),
        Route("GET", f"/models/{ID}/endpoint", routes.endpoint, {200: Endpoint}, errors=NOT_LOADED),
        Route(
            "GET",
            f"/models/{ID}/capabilities",
            routes.capabilities,
            {200: Capabilities},
            errors=(ModelNotFound,),
        ),
        Route(
            "POST",
            "/models/load",
            routes.load,
            {200: LoadAnswer, 202: LoadAnswer},
            takes=LoadRequest,
            errors=(*NOT_LOADED, *CANNOT_NOW, Conflict, LoadedDifferently, NodeFailed, Unloadable),
        ),
        Route(
            "POST",
            "/models/estimate",
            routes.estimate,
            {200: LoadEstimate},
            takes=LoadRequest,
            errors=(Unloadable,),
        ),
        Route(
            "POST",
            "/models/unload",
            routes.unload,
            {200: UnloadAnswer},
            takes=UnloadRequest,
            errors=(ModelNotFound, Conflict, NodeFailed),
        ),
        Route(
            "POST",
            "/models/clear_prefix_cache",
            routes.clear_prefix_cache,
            {200: ClearPrefixCacheAnswer},
            takes=ClearPrefixCacheRequest,
            errors=(*NOT_LOADED, NodeFailed, ShuttingDown),
        ),
        Route(
            "POST",
            r"/devices/{index:\d{1,4}}/restart",
            routes.restart_device,
            {200: RestartAnswer},
            takes=RestartRequest,
            is_body_optional=True,
            errors=(RouteNotFound, Conflict, NodeFailed, ShuttingDown),
        ),
        Route(
            "POST",
            "/v1/chat/completions",
            routes.chat_completions,
            {200: ChatCompletion},
            takes=ChatCompletionRequest,
            events=ChatCompletionChunk,
            errors=(*INFERENCE, MalformedToolCall),
        ),
        Route(
            "POST",
            "/v1/completions",
            routes.completions,
            {200: Completion},
            takes=CompletionRequest,
            events=Completion,
            errors=INFERENCE,
        ),
        Route(
            "POST",
            "/v1/embeddings",
            routes.embeddings,
            {200: EmbeddingList},
            takes=EmbeddingRequest,
            errors=INFERENCE,
        ),
        Route("GET", "/v1/models", routes.v1_models, {200: ModelList}),
        Route("GET", f"/v1/models/{ID}", routes.v1_model, {200: ModelEntry}, errors=NOT_LOADED),
        Route(
            "POST",
            "/tokenize",
            routes.tokenize,
            {200: Tokenized},
            takes=TokenizeRequest,
            errors=(*NAMES_A_MODEL, *NOT_LOADED),
        ),
    ),
)
