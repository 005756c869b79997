"""Tools in OpenAI's dialect: what a request offers, and what an answer calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
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


class FunctionName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The function that must be called."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool that must be called."""

    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class OffersTools:
    """What chat and its tokens share; a struct cannot inherit the fields of two."""

    __slots__ = ()

    tools: Tools | None
    tool_choice: ToolChoice | None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of: none where it must not call any."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def demands_call(self) -> bool:
        """Whether the answer must be a call, or several."""
        return self.tool_choice not in (None, "none", "auto")

    @staticmethod
    def refuse_choice(choice: object) -> None:
        """Raise UnsupportedParameter for a *choice*, as it came, of a kind that is not honoured."""
        kind = choice.get("type", "function") if isinstance(choice, dict) else "function"
        if kind != "function":
            raise UnsupportedParameter(
                f"'tool_choice' of type {kind!r} is not supported by this version: offer only the "
                f"tools that may be called, with 'auto' or 'required', or name one function",
                param="tool_choice",
            )

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter for tools of other types, InvalidRequest for a bad choice."""
        for index, raw in enumerate(self.tools or []):
            _refuse_tool(raw, f"tools[{index}]")
        if self.tool_choice == "required" and not self.tools:
            raise InvalidRequest(
                "'tool_choice' is 'required', and there are no tools", param="tool_choice"
            )
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in {tool["function"]["name"] for tool in self.tools or []}:
                raise InvalidRequest(
                    f"'tool_choice' names {name!r}, and there is no such tool",
                    param="tool_choice.function.name",
                )


def _refuse_tool(raw: dict[str, Any], place: str) -> None:
    if (kind := raw.get("type", "function")) != "function":
        raise UnsupportedParameter(
            f"tools of type {kind!r} are not supported by this version; use functions",
            param=f"{place}.type",
        )
    typed(raw, Tool, place)
