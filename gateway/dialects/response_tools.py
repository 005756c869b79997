"""The tools of a Responses request, as chat offers them, and the names they are called by.

    in the request                           to the node
    function, flat (or nested, as in chat)   a function
    namespace with functions in it           each of them, as ``namespace__name``, told about in the
                                             words of the namespace and its own
    custom, web_search, mcp, local_shell,    left out: nobody here could run them, and clients
    image_generation, whatever comes next    offer them to everybody

A call of ``namespace__name`` goes back to the client as a call of ``name`` in ``namespace``, and
that is how it comes in again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.requests import typed
from cortex.ipc.tools import ToolFunction

SEPARATOR = "__"
CHOICES = ("none", "auto", "required")
FIELDS = ToolFunction.__struct_fields__
"""What a function says to the model; ``defer_loading``, ``allowed_callers``, ... do not."""


@dataclass(frozen=True)
class Offered:
    """One function, and the namespace that it came in."""

    function: ToolFunction
    namespace: str | None = None
    about: str | None = None
    """What the namespace says of all that is in it."""

    @property
    def name(self) -> str:
        """What the node calls it."""
        return qualified(self.function.name, self.namespace)

    @property
    def chat(self) -> dict[str, Any]:
        """The tool, for the node."""
        described = "\n\n".join(filter(None, (self.about, self.function.description)))
        told = {**self.shown, "name": self.name, "description": described or None}
        function = {name: told[name] for name in FIELDS if told[name] is not None}
        return {"type": "function", "function": function}

    @property
    def shown(self) -> dict[str, Any]:
        """The tool, as a response repeats it."""
        inside = {"namespace": self.namespace} if self.namespace else {}
        return {"type": "function", **msgspec.structs.asdict(self.function), **inside}


@dataclass(frozen=True)
class Offer:
    """What a request offers; of it only what is *allowed* may be called (None: all)."""

    functions: tuple[Offered, ...] = ()
    allowed: frozenset[str] | None = None

    @property
    def tools(self) -> list[dict[str, Any]]:
        """What the node is told of."""
        told = (f for f in self.functions if self.allowed is None or f.name in self.allowed)
        return [function.chat for function in told]

    @property
    def shown(self) -> list[dict[str, Any]]:
        """What a response repeats."""
        return [function.shown for function in self.functions]

    def called(self, name: str) -> dict[str, str]:
        """Return what the node's call of *name* names to the client."""
        for function in self.functions:
            if function.namespace and function.name == name:
                return {"name": function.function.name, "namespace": function.namespace}
        return {"name": name}


def qualified(name: str, namespace: object) -> str:
    """Return what the node calls the function *name* in *namespace*, if it is in one."""
    if not namespace or not isinstance(namespace, str):
        return name
    return f"{namespace}{'' if namespace.endswith(SEPARATOR) else SEPARATOR}{name}"


def offer_of(tools: list[dict[str, Any]]) -> Offer:
    """Return what *tools* offer; raise InvalidRequest, with the place, for a function that is none.

    How many there may be is for the node to say.
    """
    return Offer(tuple(_functions(tools)))


def _functions(tools: list[dict[str, Any]]) -> Iterator[Offered]:
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if tool.get("type") == "function":
            yield Offered(_function(tool, place))
        elif tool.get("type") == "namespace":
            yield from _members(tool, place)


def _function(tool: dict[str, Any], place: str) -> ToolFunction:
    said = tool.get("function", tool)
    if not isinstance(said, dict):
        raise InvalidRequest(f"{place}.function: an object is needed", param=f"{place}.function")
    return typed({name: said[name] for name in FIELDS if name in said}, ToolFunction, place)


def _members(namespace: dict[str, Any], place: str) -> Iterator[Offered]:
    name, about = namespace.get("name"), namespace.get("description")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{place}.name: a string is needed", param=f"{place}.name")
    inner = namespace.get("tools")
    for index, tool in enumerate(inner if isinstance(inner, list) else []):
        if isinstance(tool, dict) and tool.get("type") == "function":
            function = _function(tool, f"{place}.tools[{index}]")
            yield Offered(function, name, about if isinstance(about, str) else None)


def choose(offer: Offer, choice: Any) -> tuple[Offer, Any]:
    """Return what of *offer* may be called, and chat's ``tool_choice``, for the client's *choice*.

    Raise UnsupportedParameter for a tool of a kind that is left out, InvalidRequest for what is no
    choice, or names what is not offered.
    """
    if choice is None or choice in CHOICES:
        return offer, choice
    if not isinstance(choice, dict):
        raise InvalidRequest(
            f"tool_choice must be one of {', '.join(CHOICES)}, or an object", param="tool_choice"
        )
    match choice.get("type"):
        case "function":
            return offer, {"type": "function", "function": {"name": _named(offer, choice)}}
        case "allowed_tools":
            return _allowed(offer, choice)
        case kind:
            raise UnsupportedParameter(
                f"'tool_choice' of type {kind!r} is not supported by this version: tools of that "
                f"kind are not run here",
                param="tool_choice.type",
            )


def _allowed(offer: Offer, choice: dict[str, Any]) -> tuple[Offer, Any]:
    tools, mode = choice.get("tools"), choice.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise InvalidRequest("the mode is 'auto' or 'required'", param="tool_choice.mode")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest("a list of tools is needed", param="tool_choice.tools")
    functions = [tool for tool in tools if tool.get("type") == "function"]
    return replace(offer, allowed=frozenset(_named(offer, tool) for tool in functions)), mode


def _named(offer: Offer, said: Mapping[str, Any]) -> str:
    name = qualified(str(said.get("name")), said.get("namespace"))
    if name in {function.name for function in offer.functions}:
        return name
    raise InvalidRequest(
        f"'tool_choice' names {name!r}, and there is no such function", param="tool_choice"
    )
