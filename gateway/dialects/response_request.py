"""What a Responses request may say, and what of that its response repeats.

``ResponsesRequest`` has what is honoured, the lists below what else is known: what cannot change
the tokens is accepted, the rest only where it asks for nothing. What nobody knows is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.gateway.dialects.response_tools import Offer
from cortex.ipc.openai import (
    MaxTokens,
    MinP,
    Penalty,
    ReasoningEffort,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
)
from cortex.ipc.requests import Parameters, decode_object, model_of, typed

LOGPROBS = "message.output_text.logprobs"
"""The one thing to ``include`` that there is here."""
UNSUPPORTED = "{name!r} is not supported by this version; leave it out"

PARAMETERS = Parameters(
    without_effect=frozenset(
        {
            "client_metadata",
            "prompt_cache_options",
            "prompt_cache_retention",
            "service_tier",
            "stream_options",
        }
    ),
    neutral={
        "background": (None, False),
        "context_management": (None, []),
        "conversation": (None,),
        "moderation": (None,),
        "prompt": (None,),
        "truncation": (None, "disabled"),
    },
    unknown="unknown parameter: {name!r}",
    unsupported=UNSUPPORTED,
)
INSTEAD = {
    "conversation": "use 'previous_response_id'",
    "truncation": "a prompt that does not fit is refused as context_length_exceeded",
}
TEXT = Parameters(
    without_effect=frozenset(),
    neutral={"verbosity": (None, "medium")},
    unknown="unknown parameter: 'text.{name}'",
    unsupported="'text.{name}' is not supported by this version; leave it out",
)
REASONING = Parameters(
    without_effect=frozenset(),
    neutral={"context": (None,), "mode": (None,)},
    unknown="unknown parameter: 'reasoning.{name}'",
    unsupported="'reasoning.{name}' is not supported by this version; leave it out",
)
PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "chat_template_kwargs",
)
"""What chat calls the same."""


class Format(msgspec.Struct, frozen=True):
    """``text.format``: what the text must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        """Refuse a schema that is none."""
        if self.type == "json_schema" and (self.name is None or self.schema is None):
            raise ValueError("Expected a `name` and a `schema` with the type 'json_schema'")

    @property
    def shown(self) -> dict[str, Any]:
        """The format as a response repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, **self._schema, "description": self.description}

    @property
    def chat(self) -> dict[str, Any]:
        """The format as chat spells it."""
        if self.type != "json_schema":
            return {"type": self.type}
        described = {"description": self.description} if self.description else {}
        return {"type": self.type, "json_schema": {**self._schema, **described}}

    @property
    def _schema(self) -> dict[str, Any]:
        return {"name": self.name, "schema": self.schema, "strict": bool(self.strict)}


class TextOptions(msgspec.Struct, frozen=True):
    """``text``."""

    format: Format | None = None


Summary = Literal["auto", "concise", "detailed"]


class ReasoningOptions(msgspec.Struct, frozen=True):
    """``reasoning``; ``generate_summary`` is the older name of ``summary``."""

    effort: ReasoningEffort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """The options as a response repeats them."""
        return {"effort": self.effort, "summary": self.summary or self.generate_summary}


class ResponsesRequest(msgspec.Struct):
    """What this version honours of a request."""

    model: str
    input: str | list[dict[str, Any] | None] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    """Of tools that the server runs; there are none."""
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @property
    def wants_summary(self) -> bool:
        """Whether reasoning is to be told as its summary too."""
        return self.reasoning is not None and self.reasoning.shown["summary"] is not None


HONOURED = frozenset(ResponsesRequest.__struct_fields__)


def decode_request(body: bytes) -> ResponsesRequest:
    """Return the request in *body*; raise the ApiError that names what is wrong with it."""
    raw = decode_object(body)
    model_of(raw)
    _refuse_unsupported(raw)
    return typed(raw, ResponsesRequest)


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    PARAMETERS.refuse_unsupported(raw, HONOURED, instead=INSTEAD)
    for name, known, shape in (
        ("text", TEXT, TextOptions),
        ("reasoning", REASONING, ReasoningOptions),
    ):
        if isinstance(options := raw.get(name), dict):  # what is none, the types refuse
            known.refuse_unsupported(options, frozenset(shape.__struct_fields__), name)


def options_of(request: ResponsesRequest, offer: Offer, choice: Any) -> dict[str, Any]:
    """Return what goes to the node beside the messages."""
    options: dict[str, Any] = {name: getattr(request, name) for name in PASSED_ON}
    options["max_completion_tokens"] = request.max_output_tokens
    options["tools"] = offer.tools or None
    if offer.tools or choice not in (None, "auto", "none"):
        options["tool_choice"] = choice
    options["parallel_tool_calls"] = request.parallel_tool_calls if offer.tools else None
    if request.text and request.text.format:
        options["response_format"] = request.text.format.chat
    if request.reasoning:
        options["reasoning_effort"] = request.reasoning.effort
    if LOGPROBS in (request.include or []) or request.top_logprobs:
        options |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return {name: value for name, value in options.items() if value is not None}


def repeated(request: ResponsesRequest, offer: Offer, *, is_stored: bool) -> dict[str, Any]:
    """Return what the response repeats of the request, at neutral values where it said nothing."""
    text = (request.text and request.text.format) or Format()

    def said(value: Any, otherwise: Any) -> Any:
        return otherwise if value is None else value

    return {
        "previous_response_id": request.previous_response_id,
        "instructions": request.instructions,
        "tools": offer.shown,
        "tool_choice": said(request.tool_choice, "auto"),
        "parallel_tool_calls": said(request.parallel_tool_calls, True),
        "max_tool_calls": request.max_tool_calls,
        "text": {"format": text.shown},
        "reasoning": (request.reasoning or ReasoningOptions()).shown,
        "temperature": said(request.temperature, 1.0),
        "top_p": said(request.top_p, 1.0),
        "top_logprobs": said(request.top_logprobs, 0),
        "presence_penalty": said(request.presence_penalty, 0.0),
        "frequency_penalty": said(request.frequency_penalty, 0.0),
        "max_output_tokens": request.max_output_tokens,
        "truncation": "disabled",
        "store": is_stored,
        "background": False,
        "service_tier": "default",
        "metadata": request.metadata or {},
        "prompt_cache_key": request.prompt_cache_key,
        "safety_identifier": request.safety_identifier,
        "user": request.user,
    }
