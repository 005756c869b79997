"""Anthropic's Messages, as the node's chat request; answers are in ``message_events.py``.

The prompt is neither added to nor taken from, with one exception that the operator can switch off:
a leading system block that is only Claude Code's billing line is dropped, because it differs in
every conversation and would defeat every prefix cache.

What cannot change the tokens is accepted; what this version cannot do is refused, by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from cortex.gateway.dialects.anthropic import ANTHROPIC, Anthropic
from cortex.gateway.dialects.dialect import AskNode
from cortex.gateway.dialects.message_events import MessageEvents, message_of
from cortex.ipc.errors import ApiError, InvalidRequest, UnsupportedParameter
from cortex.ipc.openai import MAX_TOKENS, Temperature, TopK, TopP
from cortex.ipc.requests import Parameters, decode_object, model_of, typed

BILLING = "x-anthropic-billing-header:"
PARAMETERS = Parameters(
    without_effect=frozenset(
        {"cache_control", "context_management", "metadata", "safeguards", "service_tier"}
    ),
    neutral={
        "container": (None,),
        "diagnostics": (None,),
        "inference_geo": (None,),
        "mcp_servers": (None, []),
        "speed": (None, "standard"),
        "tool_choice": (None, {"type": "auto"}, {"type": "none"}),
        "tools": (None, []),
    },
    unknown="{name}: unknown parameter",
    unsupported="{name}: not supported by this version",
)
WITHOUT_THINKING = ("disabled", "adaptive")
FIELDS_OF_A_TURN = frozenset({"role", "content", "cache_control", "output_config"})


class Turn(msgspec.Struct):
    """One message; Claude Code sends system turns among the others."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class MessagesRequest(msgspec.Struct):
    """What this version honours of a request."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(le=MAX_TOKENS)] | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None


HONOURED = frozenset(MessagesRequest.__struct_fields__) | {"thinking", "output_config"}


@dataclass(frozen=True)
class MessagesCall:
    """A call whose answer is translated."""

    model: str
    wants_stream: bool
    chat: dict[str, Any]
    path: str = "/v1/chat/completions"
    dialect: Anthropic = field(default=ANTHROPIC)

    def body(self, node_id: str) -> bytes:
        """Return the chat request."""
        return orjson.dumps({**self.chat, "model": node_id, "stream": self.wants_stream})

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return the message in a node's chat completion."""
        del node_id
        return orjson.dumps(message_of(body, self.model))

    async def translation(self, node_id: str, ask: AskNode) -> MessageEvents:
        """Return what translates the stream.

        The first event tells the tokens of the prompt, which a chat stream tells last, so the node
        is asked to count them while it computes. Where it cannot, the last event is left to tell.
        """
        try:
            counted = orjson.loads(await ask("/tokenize", self.count_body(node_id)))
            prompt_tokens = int(counted["count"])
        except (ApiError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            prompt_tokens = 0
        return MessageEvents(self.model, prompt_tokens)

    def count_body(self, node_id: str) -> bytes:
        """Return the request that counts the tokens of the prompt."""
        return orjson.dumps({"model": node_id, "messages": self.chat["messages"]})


def decode_messages(body: bytes, *, strip_billing_block: bool, counts_only: bool) -> MessagesCall:
    """Return the call in *body*; raise the ApiError that names what is wrong with it.

    With *counts_only* nothing will be generated, and ``max_tokens`` is not needed.
    """
    raw = decode_object(body)
    model_of(raw)
    _refuse_unsupported(raw)
    request = typed(raw, MessagesRequest)
    chat: dict[str, Any] = {"messages": _chat_messages(request, strip_billing_block)}
    if not counts_only:
        chat["max_tokens"] = _max_tokens(request)
        if request.messages[-1].role == "assistant":
            raise UnsupportedParameter(
                "messages: the last turn is the assistant's; continuing it (prefill) is not "
                "supported by this version",
                param="messages",
            )
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(request, name)) is not None:
            chat[name] = value
    if request.stop_sequences:
        chat["stop"] = request.stop_sequences
    return MessagesCall(request.model, bool(request.stream), chat)


def _max_tokens(request: MessagesRequest) -> int:
    if request.max_tokens is None:
        raise InvalidRequest("max_tokens: field required", param="max_tokens")
    if request.max_tokens == 0:
        raise UnsupportedParameter(
            "max_tokens: 0 (warming the prompt cache) is not supported by this version",
            param="max_tokens",
        )
    if request.max_tokens < 0:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    return request.max_tokens


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    PARAMETERS.refuse_unsupported(raw, HONOURED)
    thinking = raw.get("thinking")
    if thinking is not None and _type_of(thinking) not in WITHOUT_THINKING:
        raise _unsupported("thinking")
    _refuse_format(raw.get("output_config"), "output_config")
    turns = raw.get("messages")
    for position, turn in enumerate(turns if isinstance(turns, list) else []):
        if isinstance(turn, dict):  # what is none, the types refuse
            _refuse_unsupported_turn(turn, f"messages.{position}")


def _refuse_unsupported_turn(turn: dict[str, Any], place: str) -> None:
    for name in turn:
        if name not in FIELDS_OF_A_TURN:
            raise _unsupported(f"{place}.{name}")
    _refuse_format(turn.get("output_config"), f"{place}.output_config")


def _refuse_format(output_config: Any, place: str) -> None:
    if isinstance(output_config, dict) and output_config.get("format") is not None:
        raise _unsupported(f"{place}.format")


def _unsupported(place: str) -> UnsupportedParameter:
    return UnsupportedParameter(PARAMETERS.unsupported.format(name=place), param=place)


def _type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else None


def _chat_messages(request: MessagesRequest, strip_billing_block: bool) -> list[dict[str, Any]]:
    given = request.system
    system: list[str | dict[str, Any]] = [given] if isinstance(given, str) else [*(given or [])]
    if strip_billing_block and system and _is_billing_line(system[0]):
        system = system[1:]
    turns: list[dict[str, Any]] = []
    if system:
        turns.append({"role": "system", "content": _content(system, "system")})
    turns.extend(
        {"role": turn.role, "content": _content(turn.content, f"messages.{position}.content")}
        for position, turn in enumerate(request.messages)
    )
    return turns


def _is_billing_line(block: str | dict[str, Any]) -> bool:
    text = block if isinstance(block, str) else block.get("text")
    if not isinstance(text, str):
        return False
    line = text.strip()
    return line.startswith(BILLING) and "\n" not in line


def _content(content: str | list[Any], place: str) -> str | list[dict[str, str]]:
    """Return text, or text parts, as chat spells them; raise UnsupportedParameter for the rest."""
    if isinstance(content, str):
        return content
    texts = [_text(block, f"{place}.{position}") for position, block in enumerate(content)]
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts]


def _text(block: str | dict[str, Any], place: str) -> str:
    if isinstance(block, str):
        return block
    kind = _type_of(block)
    if kind != "text":
        raise UnsupportedParameter(
            f"{place}: blocks of type {kind!r} are not supported by this version", param=place
        )
    text = block.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{place}.text: a string is needed", param=f"{place}.text")
    return text
