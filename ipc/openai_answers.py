"""What clients of OpenAI's dialect get: answers, the chunks they stream in, and lists of models.

Field names and nulls are those that strict clients check: ``refusal``, ``annotations`` and
``logprobs`` are always there; ``reasoning_content``, ``tool_calls`` and ``stop_reason`` only where
they say something.

An answer that is as long as it may be ends with ``"finish_reason": "length"``. Where that was the
end of the model's context, and not what the request allowed, ``stop_reason`` is ``CONTEXT_FULL``:
OpenAI's clients know no such field, and the Anthropic dialect makes
``model_context_window_exceeded`` of it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from cortex.ipc.node_api import Limit
from cortex.ipc.tools import ToolCall


class Tokenized(msgspec.Struct, frozen=True):
    """Answer of ``POST /tokenize``."""

    tokens: list[int]
    count: int


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """``cached_tokens`` of the prompt were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """``reasoning_tokens`` of the answer were words of the model to itself."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one request; those of all its choices together, the prompt counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


FinishReason = Literal["stop", "length", "tool_calls"]

CONTEXT_FULL = "context_length"
"""``stop_reason`` of an answer of finish reason ``length`` that filled the context."""

StopReason = str | int | UnsetType
"""The stop string, or the token of ``stop_token_ids``, that ended an answer, as vLLM spells it, or
``CONTEXT_FULL``; absent where an end token or the limit did. The Anthropic dialect tells
``stop_sequence`` from ``end_turn`` by it."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens; ``token`` has � for bytes that are no text by themselves."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token of an answer. ``logprob`` is null where the model gave it no probability."""

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The tokens of an answer, reasoning and calls among them, or those of one chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """The same for a text completion; offsets count characters from the begin of its text.

    The first token of a prompt that is echoed has no probability: null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's turn; ``content`` is null where it only calls tools."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True):
    """One choice of a chat completion."""

    message: AnswerMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: ChatLogprobs | None = None
    stop_reason: StopReason = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of a chat completion that does not stream."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: str = "chat.completion"


class FunctionDelta(msgspec.Struct, frozen=True):
    """``name`` is in the first chunk of a call, whose arguments are empty."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to the call *index*; ``id`` and ``type`` are in its first chunk."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """The one choice of a chunk."""

    delta: Delta
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: ChatLogprobs | None = None
    stop_reason: StopReason = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a chat stream; ``usage`` is null, or absent where nobody asked for it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET


class TextChoice(msgspec.Struct, frozen=True):
    """One choice of a text completion, whole or in part."""

    text: str
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: TextLogprobs | None = None
    stop_reason: StopReason = UNSET


class Completion(msgspec.Struct, frozen=True):
    """Answer of a text completion, and each event of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs; both numbers are the same."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True):
    """The vector of one input: numbers, or base64 of its little-endian 32-bit floats."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    """Answer of ``POST /v1/embeddings``, in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class ModelEntry(msgspec.Struct, frozen=True):
    """One model of ``GET /v1/models``; what is not known is left out, absent is not zero.

    ``max_model_len`` is ``context_length`` as vLLM spells it; ``cost`` is US dollars for a million
    tokens of input, output, cache_read and cache_write.
    """

    id: str
    created: int
    owned_by: str
    object: str = "model"
    loaded: bool | UnsetType = UNSET
    locations: list[dict[str, Any]] | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    max_model_len: int | UnsetType = UNSET
    max_input_tokens: int | UnsetType = UNSET
    max_output_tokens: int | UnsetType = UNSET
    limit: Limit | UnsetType = UNSET
    capabilities: list[str] | UnsetType = UNSET
    tool_call: bool | UnsetType = UNSET
    reasoning: bool | UnsetType = UNSET
    cost: dict[str, float] | UnsetType = UNSET
    feasible_on: list[str] | UnsetType = UNSET
    """Nodes that have it, or could."""


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``.

    Codex, which asks with ``client_version``, cannot read a list without ``models``. An entry there
    must have the prompt that Codex is to use instead of its own; an empty list is read, and leaves
    it its own (codex-cli 0.169.0, 2026-11-21).
    """

    data: list[ModelEntry]
    object: str = "list"
    models: list[Any] | UnsetType = UNSET
