"""How the formats of ``tool_formats.py`` write calls, as Lark rules: for calls that are forced.

    format    opened by            a block of it
    hermes    <tool_call>          {"name": "f", "arguments": ...} </tool_call>
    qwen_xml  <tool_call>          <function=f> parameters </function> </tool_call>
              <function=           f> parameters </function>
    llama3    an answer's start    {"name": "f", "parameters": ...}; {...}
              <|python_tag|>       the same
    mistral   [TOOL_CALLS]         f[ARGS]...     where [ARGS] is a token of the model, with or
                                   without [CALL_ID] and nine characters before it
              [TOOL_CALLS]         [{"name": "f", "arguments": ...}, {...}]    where it is not

Arguments that are JSON are what the tool's schema says. The parameters of qwen_xml are plain text
between tags: a text is any text, one of several texts is one of them, anything else is JSON of its
schema. What a schema says beyond that (a pattern of a text, say) cannot be forced there, and is
refused. A parameter's text ends at the first line that is its end tag.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cortex.ipc.errors import InvalidRequest
from cortex.runtime.parameter_values import resolved, types_of
from cortex.runtime.structured import Demand, json_rule, literal

NO_ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
"""Of a tool without parameters."""
ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}

TERMINALS = ["ANY: /(?s:.)*/", r"NAME: /[^<>\s]+/"]
NEWLINE = r'"\n"?'
PARAMETER_END = "\n</parameter>\n"

OF_ARGUMENTS = frozenset(
    {
        "$defs",
        "$id",
        "$schema",
        "additionalProperties",
        "definitions",
        "description",
        "properties",
        "required",
        "title",
        "type",
    }
)
"""Keywords that parameters in tags keep; none is written that is not among the properties."""
OF_ANY_TEXT = frozenset({"default", "description", "examples", "title", "type"})
"""Keywords that do not narrow down a text."""


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool whose calls are to be written; ``place`` is that of its parameters."""

    name: str
    parameters: Mapping[str, Any] | None
    place: str
    is_enforced: bool = True
    """Whether the arguments have to be what the schema says; else they are any object."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """What the arguments have to be."""
        if not self.is_enforced:
            return ANY_ARGUMENTS
        return NO_ARGUMENTS if self.parameters is None else self.parameters

    @property
    def demand(self) -> Demand:
        """The arguments alone."""
        return Demand(f"start: {json_rule(self.schema, self.place)}", self.place)


@dataclass(slots=True)
class Rules:
    """Lark rules in the making; ``control_id`` finds the model's control tokens by their texts."""

    control_id: Callable[[str], int | None]
    lines: list[str] = field(default_factory=lambda: [*TERMINALS])
    _numbers: Any = field(default_factory=itertools.count)

    def add(self, right: str, attributes: str = "") -> str:
        """Add a rule; return its name."""
        name = f"r{next(self._numbers)}"
        self.lines.append(f"{name}{attributes}: {right}")
        return name

    def marker(self, text: str) -> str:
        """Return a part of a rule for a marker: its token where it has one."""
        token_id = self.control_id(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def until(self, end: str, after: str = "ANY") -> str:
        """Add a rule for any text, or one of *after*, up to *end*; return its name."""
        is_token = self.control_id(end) is not None  # it is in no text then
        return self.add(f"{after} {self.marker(end)}", "" if is_token else "[lazy]")

    def json(self, schema: Mapping[str, Any], place: str) -> str:
        """Add a rule for JSON of *schema*; return its name."""
        return self.add(json_rule(schema, place))


@dataclass(frozen=True, slots=True)
class Blocks:
    """How calls stand in an answer, as names of rules."""

    opened: Mapping[str, str]
    """What follows each marker."""
    at_start: str | None = None
    """What may stand at the start without one; it is then the way to begin."""
    repeats: bool = True
    """Whether a further call is a further block; else a block holds them all."""


CallGrammar = Callable[[Rules, Sequence[OfferedTool], bool], Blocks]
"""Writes the rules for calls of tools: of one call, or of several where it is True."""


def hermes(rules: Rules, tools: Sequence[OfferedTool], is_many: bool) -> Blocks:  # noqa: ARG001
    """Write ``<tool_call>{"name": "f", "arguments": {}}</tool_call>``."""
    call = _object_calls(rules, tools, "arguments")
    end = rules.marker("</tool_call>")
    return Blocks({"<tool_call>": rules.add(f"{NEWLINE} {call} {NEWLINE} {end}")})


def llama3(rules: Rules, tools: Sequence[OfferedTool], is_many: bool) -> Blocks:
    """Write ``{"name": "f", "parameters": {}}; {...}``."""
    call = _object_calls(rules, tools, "parameters")
    calls = rules.add(f'{call} ("; " {call})*') if is_many else call
    return Blocks({"<|python_tag|>": calls}, at_start=calls, repeats=False)


def mistral(rules: Rules, tools: Sequence[OfferedTool], is_many: bool) -> Blocks:
    """Write ``f[ARGS]{}``, or where the model has no token for that, ``[{...}, {...}]``."""
    if rules.control_id("[ARGS]") is not None:
        call_id = ""
        if rules.control_id("[CALL_ID]") is not None:
            call_id = f"({rules.marker('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/)?"
        head = f"{call_id} {rules.marker('[ARGS]')}"
        calls = [
            rules.add(f"{literal(tool.name)} {head} {rules.json(tool.schema, tool.place)}")
            for tool in tools
        ]
        return Blocks({"[TOOL_CALLS]": rules.add(" | ".join(calls))})
    call = _object_calls(rules, tools, "arguments")
    more = f'(", " {call})*' if is_many else ""
    return Blocks({"[TOOL_CALLS]": rules.add(f'"["  {call} {more} "]"')}, repeats=False)


def qwen_xml(rules: Rules, tools: Sequence[OfferedTool], is_many: bool) -> Blocks:  # noqa: ARG001
    """Write ``<tool_call><function=f><parameter=k>v</parameter></function></tool_call>``."""
    calls = rules.add(" | ".join(_function(rules, tool) for tool in tools))
    end = rules.marker("</tool_call>")
    return Blocks(
        {
            "<tool_call>": rules.add(rf'{NEWLINE} "<function=" {calls} {NEWLINE} {end}'),
            "<function=": calls,
        }
    )


def _object_calls(rules: Rules, tools: Sequence[OfferedTool], arguments: str) -> str:
    """Return the name of a rule for a call of one of *tools* as a JSON object."""
    calls = []
    for tool in tools:
        head = literal(f'{{"name": "{tool.name}", "{arguments}": ')
        calls.append(rules.add(f'{head} {rules.json(tool.schema, tool.place)} "}}"'))
    return rules.add(" | ".join(calls))


def _function(rules: Rules, tool: OfferedTool) -> str:
    """Return the name of a rule for a call from behind ``<function=`` to ``</function>``."""
    if tool.is_enforced:
        parameters = " ".join(_parameters(rules, tool))
    else:
        parameters = rules.add(f'"<parameter=" NAME ">\\n" {rules.until(PARAMETER_END)}') + "*"
    begin = f"{tool.name}>\n"
    return rules.add(f'{literal(begin)} {parameters} "</function>"')


def _parameters(rules: Rules, tool: OfferedTool) -> list[str]:
    """Return the parameters of *tool* in the order of its schema, the optional ones with a ``?``.

    Raise InvalidRequest for what cannot be forced.
    """
    schema = tool.schema
    if beyond := sorted(schema.keys() - OF_ARGUMENTS):
        raise _unenforceable(tool.place, f"the keyword {beyond[0]!r} of the arguments")
    members, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(members, dict) or not isinstance(required, list):
        raise InvalidRequest(f"{tool.place}: this is no JSON schema", param=tool.place)
    if missing := [name for name in required if name not in members]:
        raise _unenforceable(tool.place, f"an argument {missing[0]!r} that has no schema")
    found = []
    for name, member in members.items():
        value = _value(rules, resolved(member, schema), schema, f"{tool.place}.properties.{name}")
        begin = f"<parameter={name}>\n"
        rule = rules.add(f"{literal(begin)} {value}")
        found.append(rule if name in required else f"{rule}?")
    return found


def _value(rules: Rules, member: object, root: Mapping[str, Any], place: str) -> str:
    """Return the name of a rule for a parameter's value, its end tag included."""
    if not isinstance(member, dict):
        raise _unenforceable(place, "what is no JSON object as a schema")
    types = types_of(member)
    texts = [member["const"]] if "const" in member else member.get("enum", [])
    if texts and all(isinstance(text, str) for text in texts):
        if any(PARAMETER_END.strip() in text for text in texts):
            raise _unenforceable(place, "a text with an end tag in it")
        return rules.add(f"({' | '.join(map(literal, texts))}) {literal(PARAMETER_END)}")
    if types and "string" not in types:
        names = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return rules.add(f"{rules.json({**names, **member}, place)} {literal(PARAMETER_END)}")
    if types not in (set(), {"string"}):
        raise _unenforceable(place, "a value that is a text or something else")
    if narrowing := sorted(member.keys() - OF_ANY_TEXT):
        raise _unenforceable(place, f"the keyword {narrowing[0]!r} of a text")
    return rules.until(PARAMETER_END)


def _unenforceable(place: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{place}: {what} cannot be enforced in the format in which this model writes calls",
        param=place,
    )
