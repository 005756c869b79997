"""The messages of a request as the plain turns a chat template reads; nothing is dropped.

message                          turn
content null or absent           empty text
content of several text parts    the texts, end to end, nothing between them
role developer                   role system, which it is the newer name of
refusal of the assistant         part of its text
reasoning_content                handed to the template, which shows it where the model wants it
calls of the assistant           calls whose arguments are objects; none at all are left out
a result without a name          the name of the call that it answers, where that is known
role function                    refused: the older way, in words that name the newer
images, audio, files             refused, naming the part
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.ipc.tools import ToolCall

Turn = dict[str, Any]
"""What a template sees of one message: ``role``, ``content``, which is text, and more."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Return *messages* as turns; raise InvalidRequest or UnsupportedParameter, naming a place."""
    if not messages:
        raise InvalidRequest("there must be at least one message", param="messages")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    called: dict[str, str] = {}
    for turn in turns:
        called |= {call["id"]: call["function"]["name"] for call in turn.get("tool_calls", ())}
        if turn["role"] == "tool" and turn.get("tool_call_id") in called:
            turn.setdefault("name", called[turn["tool_call_id"]])
    return turns


def _turn(message: ChatMessage, place: str) -> Turn:
    _refuse_role(message, place)
    turn: Turn = {
        "role": ROLES[message.role],
        "content": _text(message.content, f"{place}.content") + (message.refusal or ""),
    }
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning_content is not None:  # by both names that templates read it by
        reasoning = message.reasoning_content
        turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return turn


def _refuse_role(message: ChatMessage, place: str) -> None:
    if message.role == "function":
        raise UnsupportedParameter(
            "the role 'function' is the older way to give a result; use 'tool' and tool_call_id",
            param=f"{place}.role",
        )
    if message.role not in ROLES:
        raise InvalidRequest(
            f"the role {message.role!r} is not one of {', '.join(ROLES)}", param=f"{place}.role"
        )
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"only the assistant calls tools, not {message.role!r}", param=f"{place}.tool_calls"
        )
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidRequest(
            f"only a tool's turn answers a call, not {message.role!r}",
            param=f"{place}.tool_call_id",
        )


def _call(call: ToolCall, place: str) -> dict[str, Any]:
    """Return a call whose arguments are an object; no text at all means none."""
    text = call.function.arguments
    try:
        arguments = json.loads(text, strict=False) if text.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            "the arguments of a call must be the JSON text of an object",
            param=f"{place}.function.arguments",
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


def _text(content: str | list[dict[str, Any]] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: dict[str, Any], place: str) -> str:
    kind = part.get("type")
    if kind not in {"text", "refusal"}:
        raise UnsupportedParameter(
            f"this model reads text only: it cannot take a part of type {kind!r}",
            param=f"{place}.type",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"a {kind} part needs a string in {kind!r}", param=f"{place}.{kind}")
    return text
