"""The items of a conversation, as Responses has them, as the messages that a node's chat takes.

    item                             message
    message, or a bare {role, ...}   one of its role
    reasoning                        ``reasoning_content`` of the assistant's turn; its content,
                                     else its summary; what is only encrypted is nobody's here
    function_call                    ``tool_calls`` of the assistant's turn; nothing where it is
                                     incomplete: no template could write half of its arguments
    function_call_output             the tool's turn
    custom_tool_call, its output     the same, with the call's text as ``input``
    others                           left out: traces of tools that other servers run

What the assistant says between two turns of others is one turn of its own for as long as it stands
in a turn's order: reasoning, text, calls. What steps back in that order begins another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from cortex.gateway.dialects.call_order import is_whole
from cortex.gateway.dialects.response_tools import qualified
from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.requests import string_of

Item = dict[str, Any]
Message = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
IN_ORDER = ("reasoning_content", "content", "tool_calls")
"""In which a turn of the assistant says things."""


def type_of(item: Item) -> str | None:
    """Return the type of *item*; a message may do without one."""
    kind = item.get("type") or ("message" if "role" in item else None)
    return kind if isinstance(kind, str) else None


def messages_of(items: Iterable[tuple[str, Item]]) -> list[Message]:
    """Return the messages of *items*, each with its place in the request.

    Raise InvalidRequest or UnsupportedParameter, naming the place.
    """
    turns = Turns()
    for place, item in items:
        if take := TAKERS.get(type_of(item)):
            take(turns, item, place)
    return turns.messages


class Turns:
    """Collects messages; the assistant's last turn may still be added to."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._is_open = False

    def message(self, item: Item, place: str) -> None:
        """Take words of somebody."""
        role = item.get("role")
        if role not in ROLES:
            raise InvalidRequest(
                f"{place}.role: {role!r} is not one of {', '.join(ROLES)}", param=f"{place}.role"
            )
        content = _content(item.get("content"), f"{place}.content")
        if role == "assistant":
            self._turn("content")["content"] = content
        else:
            self._others({"role": role, "content": content})

    def reasoning(self, item: Item, place: str) -> None:
        """Take words of the assistant to itself."""
        name = "content" if item.get("content") else "summary"
        parts = _parts(item.get(name) or [], f"{place}.{name}")
        if texts := [part["text"] for part in parts if part["type"] == "text"]:
            self._turn("reasoning_content")["reasoning_content"] = "\n\n".join(texts)

    def call(self, item: Item, place: str) -> None:
        """Take a call of a function, unless a limit cut it: then nobody has run it."""
        arguments = string_of(item, "arguments", place)
        if item.get("status") != "incomplete" or is_whole(arguments):
            self._call(item, place, arguments)

    def custom_call(self, item: Item, place: str) -> None:
        """Take a call of a tool that takes text."""
        text = {"input": string_of(item, "input", place)}
        self._call(item, place, msgspec.json.encode(text).decode())

    def result(self, item: Item, place: str) -> None:
        """Take what a call has returned."""
        output = item.get("output")
        if not isinstance(output, str | list):
            output = msgspec.json.encode(output).decode()
        content = _content(output, f"{place}.output")
        call_id = string_of(item, "call_id", place)
        self._others({"role": "tool", "tool_call_id": call_id, "content": content})

    def _call(self, item: Item, place: str, arguments: str) -> None:
        name = qualified(string_of(item, "name", place), item.get("namespace"))
        call = {
            "id": string_of(item, "call_id", place),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self._turn("tool_calls").setdefault("tool_calls", []).append(call)

    def _others(self, message: Message) -> None:
        self.messages.append(message)
        self._is_open = False

    def _turn(self, saying: str) -> Message:
        """Return the assistant's turn to say it in: the last one, unless that is beyond it."""
        several = saying == "tool_calls"
        beyond = () if several else IN_ORDER[IN_ORDER.index(saying) :]
        if not self._is_open or any(self.messages[-1].get(name) is not None for name in beyond):
            self.messages.append({"role": "assistant", "content": None})
            self._is_open = True
        return self.messages[-1]


TAKERS: dict[str | None, Callable[[Turns, Item, str], None]] = {
    "message": Turns.message,
    "reasoning": Turns.reasoning,
    "function_call": Turns.call,
    "function_call_output": Turns.result,
    "custom_tool_call": Turns.custom_call,
    "custom_tool_call_output": Turns.result,
}


def _content(content: Any, place: str) -> str | list[dict[str, Any]] | None:
    """Return *content* as chat spells it; one text alone is that text."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = list(_parts(content, place))
    if len(parts) == 1 and parts[0]["type"] == "text":
        text: str = parts[0]["text"]
        return text
    return parts


def _parts(content: Any, place: str) -> Iterator[dict[str, Any]]:
    if not isinstance(content, list):
        raise InvalidRequest(f"{place}: a list of parts is needed", param=place)
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        if not isinstance(part, dict):
            raise InvalidRequest(f"{where}: an object is needed", param=where)
        yield _part(part, where)


def _part(part: dict[str, Any], place: str) -> dict[str, Any]:
    match part.get("type"):
        case str(kind) if kind in TEXTS:
            return {"type": "text", "text": string_of(part, "text", place)}
        case "refusal":
            return {"type": "refusal", "refusal": string_of(part, "refusal", place)}
        case "input_image" if part.get("image_url") is not None:
            image = {"url": string_of(part, "image_url", place), "detail": part.get("detail")}
            told = {name: value for name, value in image.items() if value is not None}
            return {"type": "image_url", "image_url": told}
        case "input_image":
            raise UnsupportedParameter(
                f"{place}: files are not kept here: an image is given in 'image_url'", param=place
            )
        case kind:
            raise UnsupportedParameter(
                f"{place}: parts of type {kind!r} are not supported by this version",
                param=f"{place}.type",
            )
