"""The OpenAI shapes that cross the HTTP boundary: requests in, answers and chunks out.

Requests list every parameter that this version honours, and every one that is known but not
honoured. The latter are accepted at their neutral value only: nothing that is accepted is ignored
(``PARAMETERS``). A field that is in neither list is refused the same way.

Parameters that cannot change the tokens (``user``, ``metadata``, ``store``, ...) are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cortex.ipc.requests import Parameters, decode_object, model_of, typed

R = TypeVar("R", bound=msgspec.Struct)

Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
MAX_TOKENS = 2**31 - 1
MaxTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]

PARAMETERS = Parameters(
    without_effect=frozenset(
        {
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    ),
    neutral={
        "audio": (None,),
        "best_of": (None, 1),
        "echo": (None, False),
        "frequency_penalty": (None, 0, 0.0),
        "function_call": (None, "none"),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "logprobs": (None, False),
        "min_p": (None, 0, 0.0),
        "modalities": (None, ["text"]),
        "n": (None, 1),
        "prediction": (None,),
        "presence_penalty": (None, 0, 0.0),
        "reasoning_effort": (None,),
        "repetition_penalty": (None, 1, 1.0),
        "response_format": (None, {"type": "text"}),
        "suffix": (None, ""),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "top_logprobs": (None, 0),
        "verbosity": (None,),
        "web_search_options": (None,),
    },
    unknown="unknown parameter: {name!r}",
    unsupported="{name!r} is not supported by this version; leave it out",
)


class StreamOptions(msgspec.Struct, frozen=True):
    """``stream_options`` of a request."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One turn; ``content`` is text, a list of parts, or null (a replayed tool turn)."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class SamplingRequest(msgspec.Struct, kw_only=True):
    """What chat and text completions share."""

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    max_tokens: MaxTokens | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The non-empty stop strings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream should end with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(SamplingRequest, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit_tokens(self) -> int | None:
        """The newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens


class CompletionRequest(SamplingRequest, kw_only=True):
    """``POST /v1/completions``; the prompt is text or token ids, one of them."""

    prompt: str | list[TokenId | str]

    def __post_init__(self) -> None:
        """Refuse several prompts at once, and lists that mix text and ids."""
        if isinstance(self.prompt, list) and any(isinstance(item, str) for item in self.prompt):
            if len(self.prompt) > 1:
                raise ValueError(
                    "Expected one prompt: a text, or a list of token ids - at `$.prompt`"
                )
            self.prompt = self.prompt[0]  # type: ignore[assignment]  # the one text

    @property
    def limit_tokens(self) -> int | None:
        """What the client asked for; OpenAI's default of 16 is applied by the route."""
        return self.max_tokens


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /tokenize``: messages, or a prompt; sampling parameters are not needed."""

    model: str
    messages: list[ChatMessage] | None = None
    prompt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokenized(msgspec.Struct, frozen=True):
    """Answer of ``POST /tokenize``."""

    tokens: list[int]
    count: int


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """``cached_tokens`` of the prompt were found in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


FinishReason = Literal["stop", "length"]


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's turn; ``refusal`` is always there and null, as strict clients want it."""

    content: str
    role: str = "assistant"
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    """The one choice of a chat completion.

    ``stop_reason`` is the stop string that ended the answer, as vLLM spells it; absent where an end
    token or the limit did. The Anthropic dialect tells ``stop_sequence`` from ``end_turn`` by it.
    """

    message: AnswerMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None
    stop_reason: str | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of a chat completion that does not stream."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: str = "chat.completion"


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """The one choice of a chunk; ``stop_reason`` as in Choice."""

    delta: Delta
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: None = None
    stop_reason: str | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a chat stream; ``usage`` is null, or absent where nobody asked for it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET


class TextChoice(msgspec.Struct, frozen=True):
    """The one choice of a text completion, whole or in part."""

    text: str
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: None = None


class Completion(msgspec.Struct, frozen=True):
    """Answer of a text completion, and each event of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class ModelEntry(msgspec.Struct, frozen=True):
    """One model of ``GET /v1/models``; unknown limits are left out, absent is not zero."""

    id: str
    created: int
    owned_by: str
    object: str = "model"
    loaded: bool | UnsetType = UNSET
    locations: list[dict[str, Any]] | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    max_model_len: int | UnsetType = UNSET
    max_input_tokens: int | UnsetType = UNSET


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: list[ModelEntry]
    object: str = "list"


def decode_request(body: bytes, shape: type[R]) -> R:
    """Return the request in *body*.

    Raise MalformedJson, MissingModelField, UnsupportedParameter or InvalidRequest, each naming the
    place.
    """
    raw = decode_object(body)
    model_of(raw)
    honoured = frozenset(field.encode_name for field in msgspec.structs.fields(shape))
    PARAMETERS.refuse_unsupported(raw, honoured)
    return typed({name: value for name, value in raw.items() if name in honoured}, shape)
