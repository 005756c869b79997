"""The formats in which models write calls, by family.

name        a call
hermes      <tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>
qwen_xml    <tool_call><function=f><parameter=k>1</parameter></function></tool_call>
llama3      {"name": "f", "parameters": {"k": 1}}; {"name": ...
            at the start of an answer, or behind <|python_tag|>
mistral     [TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}, ...]
            [TOOL_CALLS]f[ARGS]{"k": 1}[TOOL_CALLS]..., with [CALL_ID]id before [ARGS] or not

Between <tool_call> and </tool_call> either kind is read. Brackets that are missing before
</tool_call>, or at the end of an answer, are put in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cortex.runtime.tool_call_json import object_call, read_json
from cortex.runtime.tool_call_parsing import Calls, Characters, Malformed, Parser, Parsing
from cortex.runtime.tool_call_xml import (
    BLOCK_END,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    function_call,
)
from cortex.runtime.tool_grammars import CallGrammar, hermes, llama3, mistral, qwen_xml

MAX_HEAD_CHARACTERS = 512
"""Of name and id before the arguments of Mistral's newer format."""


def _tool_call(characters: Characters, calls: Calls) -> Parsing[None]:
    if (yield from characters.peek_past_space()) == "{":
        yield from object_call(characters, calls, BLOCK_END)
    else:
        yield from characters.expect("<function=")
        yield from function_call(characters, calls)
    yield from _block_end(characters)


def _function(characters: Characters, calls: Calls) -> Parsing[None]:
    yield from function_call(characters, calls)
    yield from _block_end(characters)


def _block_end(characters: Characters) -> Parsing[None]:
    if (yield from characters.peek_past_space()) == "<":
        yield from characters.expect(BLOCK_END)


def _llama_calls(characters: Characters, calls: Calls) -> Parsing[None]:
    yield from characters.peek_past_space()
    yield from object_call(characters, calls)
    while (yield from characters.peek_past_space()) == ";":
        yield from characters.take()
        yield from characters.peek_past_space()
        yield from object_call(characters, calls)


def _mistral_calls(characters: Characters, calls: Calls) -> Parsing[None]:
    if (yield from characters.peek_past_space()) != "[":
        yield from _named_call(characters, calls)
        return
    yield from characters.take()
    c = ","
    while c == ",":
        yield from characters.peek_past_space()
        yield from object_call(characters, calls)
        c = yield from characters.peek_past_space()
        if c:
            yield from characters.take()
    if c not in {"]", ""}:
        raise Malformed("a list does not end")


def _named_call(characters: Characters, calls: Calls) -> Parsing[None]:
    """Read ``f[ARGS]{...}``, ``f[CALL_ID]id[ARGS]{...}`` or ``f{...}``."""
    head = ""
    while (yield from characters.peek()) != "{":
        head += yield from characters.take()
        if len(head) > MAX_HEAD_CHARACTERS:
            raise Malformed("the arguments are missing")
    named = re.fullmatch(r"\s*([^\s\[]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\]\s*)?", head)
    if not named:
        raise Malformed(f"{head!r} names no tool")
    calls.begin(named[1])
    yield from read_json(characters, calls.write)
    calls.end(characters)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes its calls."""

    written: str
    """A regular expression for a call of PROBECALL, as the family's chat templates write it."""
    begins: Mapping[str, Parser]
    """The markers that open a block anywhere, and the parsers of what follows them."""
    grammar: CallGrammar
    """How calls are written where a grammar demands them."""
    further_markers: tuple[str, ...] = ()
    """Those that come within a block."""
    begins_at_start: Mapping[str, Parser] = field(default_factory=dict)
    """Texts that open one where an answer begins with them; their parsers read them too."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; some tokenizers have control tokens for them."""
        return (*self.begins, *self.further_markers)


FORMATS = {
    "qwen_xml": ToolFormat(
        written=r"<tool_call>\s*<function=PROBECALL>",
        begins={"<tool_call>": _tool_call, "<function=": _function},
        grammar=qwen_xml,
        further_markers=(BLOCK_END, FUNCTION_END, PARAMETER, PARAMETER_END),
    ),
    "hermes": ToolFormat(
        written=r'<tool_call>\s*\{\s*"name": "PROBECALL"',
        begins={"<tool_call>": _tool_call},
        grammar=hermes,
        further_markers=(BLOCK_END,),
    ),
    "mistral": ToolFormat(
        written=r'\[TOOL_CALLS\]\s*(?:PROBECALL|\[\{"name": "PROBECALL")',
        begins={"[TOOL_CALLS]": _mistral_calls},
        grammar=mistral,
        further_markers=("[ARGS]", "[CALL_ID]"),
    ),
    "llama3": ToolFormat(
        written=r'\{"name": "PROBECALL", "parameters"',
        begins={"<|python_tag|>": _llama_calls},
        grammar=llama3,
        begins_at_start={"{": _llama_calls},
    ),
}


def format_written_in(prompt: str) -> str | None:
    """Return the name of the format in which *prompt* holds a call of PROBECALL."""
    return next((name for name, form in FORMATS.items() if re.search(form.written, prompt)), None)
