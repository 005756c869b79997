"""Anthropic's tools as functions of a chat request.

tool                                      becomes
with an input_schema, whatever its type   a function
one that Anthropic's servers run          left out: nobody runs it here (``RUN_ELSEWHERE``)
another without a schema                  refused by name: the model does not know it by itself
with defer_loading                        a function behind all others, in the order in which
                                          the conversation found them: what stands before stays
                                          in the prefix cache when another one is found
removed by a block of a turn              nothing, unless a later block adds it again
defined by a block of a turn              a function, behind all others

tool_choice                     becomes
auto, none                      the same; nothing where there is no tool
any                             required
tool                            the function that is named
disable_parallel_tool_use       parallel_tool_calls: false
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.gateway.dialects.message_request import Block, MessagesRequest, Turn, unsupported
from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.requests import typed
from cortex.ipc.tools import NAME

RUN_ELSEWHERE = (
    "advisor_",
    "code_execution_",
    "mcp_toolset",
    "tool_search_tool_",
    "web_fetch_",
    "web_search_",
)
"""How the types begin of tools that the client leaves to Anthropic's servers."""
CHANGES = ("tool_addition", "tool_removal")
"""Blocks that change what is offered, and say nothing themselves."""


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool with a schema. ``type`` and what follows it cannot change what the model is told."""

    name: Annotated[str, Meta(pattern=NAME)]
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[str] | None = None
    type: str | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None

    def function(self) -> Block:
        """Return it as chat spells it; examples stand in the schema, where JSON Schema has them."""
        parameters = self.input_schema
        if self.input_examples:
            parameters = {**parameters, "examples": self.input_examples}
        said: Block = {"name": self.name, "parameters": parameters}
        if self.description is not None:
            said["description"] = self.description
        if self.strict:
            said["strict"] = True
        return {"type": "function", "function": said}


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


@dataclass
class Offer:
    """The tools of one request."""

    tools: dict[str, Tool] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, raw: Block, place: str) -> None:
        """Take a tool that stands at *place*."""
        kind, name = str(raw.get("type")), raw.get("name") or raw.get("mcp_server_name")
        if "input_schema" not in raw and kind.startswith(RUN_ELSEWHERE):
            self.left_out.append(str(name or kind))
            return
        if "input_schema" not in raw and kind not in ("None", "custom"):
            raise UnsupportedParameter(
                f"{place}: a model here does not know {kind!r} by itself; give the tool an "
                f"input_schema",
                param=place,
            )
        tool = typed(raw, Tool, place)
        if "direct" in (tool.allowed_callers or ["direct"]):
            self.tools[tool.name] = tool
        else:
            self.left_out.append(tool.name)

    def functions(self, found: list[str]) -> list[Block]:
        """Return the functions; of the deferred ones those in *found* first, in that order."""
        order = {name: at for at, name in reversed([*enumerate(found)])}
        fixed = [tool for tool in self.tools.values() if not tool.defer_loading]
        deferred = [tool for tool in self.tools.values() if tool.defer_loading]
        deferred.sort(key=lambda tool: order.get(tool.name, len(found)))
        return [tool.function() for tool in (*fixed, *deferred)]


def offer_of(request: MessagesRequest) -> Offer:
    """Return what *request* offers at its end; raise ApiError, naming the place."""
    offer = Offer()
    for position, raw in enumerate(request.tools or []):
        place = f"tools.{position}"
        if isinstance(name := raw.get("name"), str) and name in offer.tools:
            raise InvalidRequest(f"{place}.name: {name!r} is there twice", param=f"{place}.name")
        offer.add(raw, place)
    declared = dict(offer.tools)
    for place, block in _changes(request.messages):
        _change(offer, declared, block, place)
    return offer


def tools_of(request: MessagesRequest, offer: Offer) -> Block:
    """Return the parameters of a chat request that are about tools."""
    functions = offer.functions(list(_found(request.messages)))
    choice = typed(request.tool_choice or {"type": "auto"}, ToolChoice, "tool_choice")
    said: Block = {"tools": functions} if functions else {}
    if choice.type == "any" and not functions:
        raise InvalidRequest("tool_choice: 'any' needs a tool", param="tool_choice")
    if choice.type == "tool":
        said["tool_choice"] = _named(choice.name, offer)
    elif functions and choice.type != "auto":
        said["tool_choice"] = {"any": "required", "none": "none"}[choice.type]
    if functions and choice.disable_parallel_tool_use:
        said["parallel_tool_calls"] = False
    return said


def _named(name: str | None, offer: Offer) -> Block:
    if name in offer.tools:
        return {"type": "function", "function": {"name": name}}
    why = "runs on servers that are not here" if name in offer.left_out else "is no tool"
    raise InvalidRequest(f"tool_choice.name: {name!r} {why}", param="tool_choice.name")


def _changes(turns: list[Turn]) -> Iterator[tuple[str, Block]]:
    for at, turn in enumerate(turns):
        for position, block in enumerate(turn.blocks):
            if block.get("type") in CHANGES:
                yield f"messages.{at}.content.{position}", block


def _change(offer: Offer, declared: dict[str, Tool], block: Block, place: str) -> None:
    """Do to *offer* what a block at *place* says; only *declared* tools can be referred to."""
    is_added = block["type"] == "tool_addition"
    match block.get("tool"):
        case {"type": "tool_definition", "definition": dict(definition)} if is_added:
            offer.add(definition, f"{place}.tool.definition")
            declared |= offer.tools
        case {"type": "tool_reference", "name": str(name)} if name in offer.left_out:
            return
        case {"type": "tool_reference", "name": str(name)} if name in declared:
            offer.tools.pop(name, None)
            if is_added:
                offer.tools[name] = declared[name]
        case {"type": "tool_reference", "name": name}:
            raise InvalidRequest(f"{place}.tool: there is no tool {name!r}", param=f"{place}.tool")
        case _:
            raise unsupported(f"{place}.tool")


def _found(turns: list[Turn]) -> Iterator[str]:
    """Yield the names of tools in the order in which the conversation refers to them."""
    for turn in turns:
        for block in turn.blocks:
            inside = block.get("content")
            for entry in inside if isinstance(inside, list) else [block.get("tool")]:
                match entry:
                    case {"type": "tool_reference", "tool_name": str(name)}:
                        yield name
                    case {"type": "tool_reference", "name": str(name)}:
                        yield name
                    case _:
                        continue
