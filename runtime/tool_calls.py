"""The calls of tools in the text of an answer, as they form.

    text ──marker──► block ──its parser──► CallBegins, CallArguments... ──► text

A format (``tool_formats.py``) says which markers open a block and how it is parsed, one character
at a time, so how the text is split does not matter. A call begins once its name and the first
character of its arguments are known. Nothing that could be the beginning of a marker is shown.

    a block that is malformed                    is
    before a call of it has begun                text, from its marker on
    between two calls, or behind the last one    text, from there on
    within a call that has begun                 CallMalformed, with the text of that call

    a block in which the answer is cut           is
    before a call of it has begun                text, from its marker on
    between two calls, or behind the last one    nothing more than its calls
    within a call that has begun                 that call, as far as it came

A call of a tool that was not offered is malformed: nobody could run it, and what the model says is
then at least seen. Whitespace around calls belongs to the format and is dropped.
"""

from __future__ import annotations

from cortex.runtime.held_text import could_begin
from cortex.runtime.json_text import SPACE, NotJson
from cortex.runtime.pieces import Piece
from cortex.runtime.tool_call_parsing import Calls, Characters, Malformed, Offered, Parser
from cortex.runtime.tool_formats import ToolFormat


class _Block:
    """A block that is being read."""

    def __init__(self, lead: str, parser: Parser, calls: Calls) -> None:
        self.characters = Characters()
        self._lead = lead
        self._calls = calls
        self._ended_before = calls.ended
        self._parsing = parser(self.characters, calls)
        next(self._parsing)

    @property
    def has_call(self) -> bool:
        """Whether one of its calls has ended."""
        return self._calls.ended > self._ended_before

    @property
    def lead(self) -> str:
        """Whitespace and marker, which belong to its first call."""
        return "" if self.has_call else self._lead

    def add(self, text: str) -> bool:
        """Read *text*, "" for the end of the answer; return whether the block is over.

        Raise Malformed or NotJson.
        """
        try:
            self._parsing.send(text)
        except StopIteration:
            return True
        return False


class ToolCallReader:
    """Reads one answer to a request that offered tools; *is_begun*: what an answer continues."""

    def __init__(self, form: ToolFormat, offered: Offered, *, is_begun: bool = False) -> None:
        self._form = form
        self._calls = Calls(offered)
        self._block: _Block | None = None
        self._held = ""
        """Text that may belong to a marker, or be the whitespace before one."""
        self._is_at_start = not is_begun
        self._is_behind_call = False

    @property
    def is_in_call(self) -> bool:
        """See ``pieces.Reader``."""
        return self._calls.is_open

    def add(self, text: str) -> list[Piece]:
        """Return the pieces that became final with *text*."""
        while text:
            text = self._parse(self._block, text) if self._block else self._scan(text)
        return self._calls.take()

    def flush(self, *, ended: bool = False) -> list[Piece]:
        """Return what was held back; see ``pieces.Reader``."""
        if self._block:
            self._held = self._parse(self._block, "") if ended else self._cut(self._block)
        rest, self._held = self._held, ""
        self._calls.say(rest.lstrip(SPACE) if self._is_behind_call else rest)
        return self._calls.take()

    def _scan(self, text: str) -> str:
        """Show the text before a marker, open its block, and return what follows the marker."""
        text, self._held = self._held + text, ""
        if self._is_behind_call:
            text = text.lstrip(SPACE)
            self._is_behind_call = not text
        if self._is_at_start and (parser := self._parser_at_start(text)):
            stripped = text.lstrip(SPACE)
            return self._open(text[: len(text) - len(stripped)], parser, stripped)
        found = [(at, marker) for marker in self._form.begins if (at := text.find(marker)) >= 0]
        at, marker = min(found, default=(len(text) - could_begin(text, self._form.begins), ""))
        shown = text[:at].rstrip(SPACE)
        self._show(shown)
        if not marker:
            self._held = text[len(shown) :]
            return ""
        end = at + len(marker)
        return self._open(text[len(shown) : end], self._form.begins[marker], text[end:])

    def _parser_at_start(self, text: str) -> Parser | None:
        begins = self._form.begins_at_start.items()
        return next(
            (parser for word, parser in begins if text.lstrip(SPACE).startswith(word)), None
        )

    def _open(self, lead: str, parser: Parser, rest: str) -> str:
        self._is_at_start = False
        self._block = _Block(lead, parser, self._calls)
        return rest

    def _show(self, text: str) -> None:
        if text:
            self._is_at_start = False
            self._calls.say(text)

    def _parse(self, block: _Block, text: str) -> str:
        """Let *block* read *text*; return what it leaves."""
        try:
            if not block.add(text):
                return ""
        except (Malformed, NotJson):
            return self._leave(block)
        self._close(block)
        return block.characters.ahead

    def _close(self, block: _Block) -> None:
        self._block = None
        self._is_behind_call = block.has_call

    def _cut(self, block: _Block) -> str:
        """End *block*, in which the answer was cut; return what of it is text."""
        self._close(block)
        if self._calls.is_open or block.has_call:
            return ""
        return block.lead + block.characters.taken + block.characters.ahead

    def _leave(self, block: _Block) -> str:
        """Give up *block*, by the table above; return what of it is scanned again."""
        lead, taken = block.lead, block.characters.taken
        self._close(block)
        if self._calls.is_open:
            self._calls.spoil(lead + taken)
            self._is_behind_call = False
            return block.characters.ahead
        self._calls.say(lead)
        return taken + block.characters.ahead
