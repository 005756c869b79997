"""The messages of a request as the plain turns a chat template reads; nothing is dropped.

message                          turn
content null or absent           empty text
content of several text parts    the texts, end to end, nothing between them
role developer                   role system, which it is the newer name of
refusal of the assistant         part of its text
reasoning_content                handed to the template, which shows it where the model wants it
tool turns and calls, media      refused: not supported by this version
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.openai import ChatMessage

Turn = dict[str, Any]
"""What a template sees of one message: plain strings only."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TOOL_ROLES = frozenset({"tool", "function"})
FOLD_SEPARATOR = "\n\n"


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Return *messages* as turns; raise InvalidRequest or UnsupportedParameter, naming a place."""
    if not messages:
        raise InvalidRequest("there must be at least one message", param="messages")
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _turn(message: ChatMessage, place: str) -> Turn:
    _refuse_tools(message, place)
    if message.role not in ROLES:
        raise InvalidRequest(
            f"the role {message.role!r} is not one of {', '.join(ROLES)}", param=f"{place}.role"
        )
    turn: Turn = {
        "role": ROLES[message.role],
        "content": _text(message.content, f"{place}.content") + (message.refusal or ""),
    }
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning_content is not None:
        turn["reasoning_content"] = message.reasoning_content
    return turn


def _refuse_tools(message: ChatMessage, place: str) -> None:
    for name, is_used in {
        "role": message.role in TOOL_ROLES,
        "tool_calls": bool(message.tool_calls),
        "tool_call_id": message.tool_call_id is not None,
    }.items():
        if is_used:
            raise UnsupportedParameter(
                "tools are not supported by this version, nor are their turns in a conversation",
                param=f"{place}.{name}",
            )


def _text(content: str | list[dict[str, Any]] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: dict[str, Any], place: str) -> str:
    kind = part.get("type")
    if kind not in {"text", "refusal"}:
        raise UnsupportedParameter(
            f"content parts of type {kind!r} are not supported by this version; use text",
            param=f"{place}.type",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"a {kind} part needs a string in {kind!r}", param=f"{place}.{kind}")
    return text


def fold_systems(turns: Iterable[Turn], *, keep_first: bool) -> list[Turn]:
    """Return *turns* with no system turn, save a leading one if *keep_first*.

    Leading system turns become one. Any other joins the user turn that follows it, else the one
    before it, else becomes a user turn where it stands. Order and every word are kept.
    """
    folded: list[Turn] = []
    pending: list[str] = []  # system texts that wait for a user turn right behind them
    for turn in turns:
        if turn["role"] == "system":
            if keep_first and not pending and [t["role"] for t in folded] in ([], ["system"]):
                _append(folded, turn)
            else:
                pending.append(turn["content"])
        elif turn["role"] == "user":
            texts = [*pending, turn["content"]]
            folded.append({**turn, "content": FOLD_SEPARATOR.join(texts)})
            pending = []
        else:
            _settle(folded, pending)
            pending = []
            folded.append(turn)
    _settle(folded, pending)
    return folded


def _append(folded: list[Turn], turn: Turn) -> None:
    """Start the leading system turn, or add to it."""
    if folded:
        joined = FOLD_SEPARATOR.join([folded[0]["content"], turn["content"]])
        folded[0] = {**folded[0], "content": joined}
    else:
        folded.append(turn)


def _settle(folded: list[Turn], pending: Sequence[str]) -> None:
    """Put texts that no user turn follows where they stand: into the user turn before them."""
    if not pending:
        return
    text = FOLD_SEPARATOR.join(pending)
    if folded and folded[-1]["role"] == "user":
        joined = FOLD_SEPARATOR.join([folded[-1]["content"], text])
        folded[-1] = {**folded[-1], "content": joined}
    else:
        folded.append({"role": "user", "content": text})
