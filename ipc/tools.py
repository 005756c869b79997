"""Tools in OpenAI's dialect: what a request offers, and what an answer calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.ipc.errors import UnsupportedParameter
from cortex.ipc.requests import typed

MAX_TOOLS = 512
NAME = r"^[a-zA-Z0-9_.-]{1,128}(?![\s\S])"  # a $ would let a newline follow

Tools = Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)]
"""Each is a ``Tool``, kept as it came, because the model sees it so."""


class FunctionCall(msgspec.Struct, frozen=True):
    """What is called, with the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool, in an answer, or in a turn that is replayed."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``parameters`` is a JSON schema; it goes to the model as it is."""

    name: Annotated[str, Meta(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    function: ToolFunction
    type: Literal["function"] = "function"


class OffersTools:
    """What chat and its tokens share; a struct cannot inherit the fields of two."""

    __slots__ = ()

    tools: Tools | None
    tool_choice: str | dict[str, Any] | None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of: none where it must not call any."""
        return [] if self.tool_choice == "none" else self.tools or []

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter for what needs a grammar, and for tools of other types."""
        for index, raw in enumerate(self.tools or []):
            _refuse_tool(raw, f"tools[{index}]")
        if self.tool_choice not in (None, "auto", "none"):
            raise UnsupportedParameter(
                "'tool_choice' can be 'auto' or 'none': this version cannot force a call",
                param="tool_choice",
            )


def _refuse_tool(raw: dict[str, Any], place: str) -> None:
    if (kind := raw.get("type", "function")) != "function":
        raise UnsupportedParameter(
            f"tools of type {kind!r} are not supported by this version; use functions",
            param=f"{place}.type",
        )
    if typed(raw, Tool, place).function.strict:
        raise UnsupportedParameter(
            "'strict' is not supported by this version: it cannot force arguments into a schema",
            param=f"{place}.function.strict",
        )
