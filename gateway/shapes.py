"""Bodies and answers of the dialects that are translated here, as ``/openapi.json`` shows them.

What decodes and what makes them is in ``dialects/``; nothing else uses these types. A body has the
fields of what decodes it, and those that are judged before the types are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cortex.gateway.dialects.message_request import MessagesRequest
from cortex.gateway.dialects.response_request import ResponsesRequest
from cortex.ipc.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    MaxTokens,
)
from cortex.ipc.requests import ModelId

KeepAlive = float | str | None
"""How long the model stays after it, as Ollama says it: seconds, ``"5m"``, below zero for ever."""


class ChatCompletionBody(ChatCompletionRequest, kw_only=True):
    """``POST /v1/chat/completions``, as neurons take it; an engine may take more."""

    keep_alive: KeepAlive = None


class CompletionBody(CompletionRequest, kw_only=True):
    """``POST /v1/completions``, as neurons take it; an engine may take more."""

    keep_alive: KeepAlive = None


class EmbeddingBody(EmbeddingRequest, kw_only=True):
    """``POST /v1/embeddings``, as neurons take it; an engine may take more."""

    keep_alive: KeepAlive = None


class KeepAllThinking(msgspec.Struct, frozen=True):
    """The one edit of a context that is done anyway."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(msgspec.Struct, frozen=True):
    """``context_management``."""

    edits: list[KeepAllThinking] | None = None


class CountTokensBody(MessagesRequest, kw_only=True):
    """``POST /v1/messages/count_tokens``: a message's body; what limits an answer does nothing."""

    model: ModelId
    context_management: ContextManagement | None = None


class MessagesBody(MessagesRequest, kw_only=True):
    """``POST /v1/messages``."""

    model: ModelId
    max_tokens: MaxTokens
    context_management: ContextManagement | None = None


class ResponsesBody(ResponsesRequest, kw_only=True):
    """``POST /v1/responses``."""

    model: ModelId


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens of a message; cached ones are not among the input tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens_details: dict[str, int] | None


class Message(msgspec.Struct, frozen=True):
    """Answer of ``POST /v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(msgspec.Struct, frozen=True):
    """One event of a message's stream; its name is its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    index: int | UnsetType = UNSET


class TokenCount(msgspec.Struct, frozen=True):
    """Answer of ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class InputTokens(msgspec.Struct, frozen=True):
    """Answer of ``POST /v1/responses/input_tokens``."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class AnthropicModel(msgspec.Struct, frozen=True):
    """A model as Anthropic's clients want it; null is not known."""

    id: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: str
    capabilities: dict[str, Any] | None
    max_input_tokens: int | None
    max_tokens: int | None


class AnthropicModels(msgspec.Struct, frozen=True):
    """A page of them."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Response(msgspec.Struct, frozen=True):
    """Answer of ``POST /v1/responses``; it repeats what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    previous_response_id: str | None
    tools: list[dict[str, Any]]


class ResponseEvent(msgspec.Struct, frozen=True):
    """One event of a response's stream; numbers have no gaps."""

    type: Annotated[str, Meta(pattern=r"^response\.")]
    sequence_number: Annotated[int, Meta(ge=0)]


class DeletedResponse(msgspec.Struct, frozen=True):
    """Answer of ``DELETE /v1/responses/{id}``."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(msgspec.Struct, frozen=True):
    """Answer of ``GET /v1/responses/{id}/input_items``: a page."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class NodesUp(msgspec.Struct, frozen=True):
    """How many there are."""

    healthy: int
    total: int


class GatewayHealth(msgspec.Struct, frozen=True):
    """Answer of ``GET /health``."""

    status: Literal["ok", "impaired", "degraded", "draining"]
    nodes: NodesUp
    unservable: list[dict[str, Any]] | UnsetType = UNSET
    """Models that are loaded in vain, where, and why."""
