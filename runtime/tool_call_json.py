"""Calls that are JSON objects: ``{"name": "f", "arguments": {"k": 1}}``.

``arguments`` and ``parameters`` are the same word. They may come before the name, may be a string
that holds the object, as some models write it, and may be absent, which is {}. Their text is passed
on as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from cortex.runtime.json_text import JsonText, json_of
from cortex.runtime.tool_call_parsing import Calls, Characters, Malformed, Parsing

ARGUMENTS = ("arguments", "parameters")
MEANINGLESS = ("id", "type")
"""Keys that may come before the name and say nothing."""

PLAIN_TEXT = re.compile(r'[^"\\\x00-\x1f]+')
"""What stands for itself in a JSON string."""

Write = Callable[[str], None]


def object_call(characters: Characters, calls: Calls, end_tag: str = "") -> Parsing[None]:
    """Read one call, up to its closing brace or *end_tag*."""
    yield from _ObjectCall(characters, calls, end_tag).read()


class _ObjectCall:
    def __init__(self, characters: Characters, calls: Calls, end_tag: str) -> None:
        self._characters = characters
        self._calls = calls
        self._end_tag = end_tag
        self._name = ""
        self._has_arguments = False
        self._early: list[str] = []
        """The arguments, where they came before the name."""

    def read(self) -> Parsing[None]:
        characters = self._characters
        yield from characters.expect("{")
        c = yield from characters.peek_past_space()
        while c and c not in {"}", self._end_tag[:1]}:
            yield from self._member()
            c = yield from self._comma()
        if c == "}":
            yield from characters.take()
        elif c:
            yield from characters.expect(self._end_tag)
        if not self._name:
            raise Malformed("the name is missing")
        if not self._has_arguments:
            self._begin()("{}")
        self._calls.end(characters)

    def _member(self) -> Parsing[None]:
        key = yield from _string(self._characters)
        yield from self._characters.peek_past_space()
        yield from self._characters.expect(":")
        yield from self._characters.peek_past_space()
        if key == "name" and not self._name:
            self._name = yield from _string(self._characters)
            self._calls.check(self._name)
            if self._has_arguments:
                self._begin()("".join(self._early))
        elif key in ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            yield from _arguments(self._characters, self._begin, self._end_tag)
        elif key not in {"name", *ARGUMENTS} and (self._name or key in MEANINGLESS):
            yield from _any_value(self._characters)
        else:
            raise Malformed(f"{key!r} is not expected here")

    def _begin(self) -> Write:
        """Begin the call, if it has a name yet; return what takes its arguments."""
        if not self._name:
            return self._early.append
        self._calls.begin(self._name)
        return self._calls.write

    def _comma(self) -> Parsing[str]:
        """Take the comma between two members; return what follows, or stands in its place."""
        c = yield from self._characters.peek_past_space()
        if c == '"':
            raise Malformed("a comma is missing")
        if c == ",":
            yield from self._characters.take()
            c = yield from self._characters.peek_past_space()
            if c != '"':
                raise Malformed("a key is missing")
        return c


def _arguments(characters: Characters, begin: Callable[[], Write], end_tag: str) -> Parsing[None]:
    """Read the value of ``arguments`` into what *begin* returns; it becomes an object."""
    c = yield from characters.peek()
    if c == "{":
        yield from read_json(characters, begin(), end_tag)
        return
    if c == '"':
        text = (yield from _string(characters)).strip()
        value = json_of(text) if text else "{}"
    else:
        value = "{}" if (yield from _any_value(characters)) == "null" else None
    if value is None or not value.startswith("{"):
        raise Malformed("the arguments are no object")
    begin()(value)


def read_json(characters: Characters, write: Write, end_tag: str = "") -> Parsing[None]:
    """Read one JSON string, array or object into *write*, as it comes."""
    value = JsonText()
    while not value.is_complete:
        c = yield from characters.peek()
        if c in {"", end_tag[:1]} and not value.is_in_string:
            write(value.close())
            return
        write(value.add((yield from characters.take())))
        if value.is_in_plain_text:
            write(characters.run(PLAIN_TEXT))


def _string(characters: Characters) -> Parsing[str]:
    """Read a JSON string; return what it says."""
    if (yield from characters.peek()) != '"':
        raise Malformed("a string is missing")
    parts: list[str] = []
    yield from read_json(characters, parts.append)
    text: str = json.loads("".join(parts))
    return text


def _any_value(characters: Characters) -> Parsing[str]:
    """Read any JSON value; return its text."""
    parts: list[str] = []
    if (yield from characters.peek()) in {'"', "{", "["}:
        yield from read_json(characters, parts.append)
        return "".join(parts)
    while (c := (yield from characters.peek())) and c not in ",}]< \t\n\r":
        parts.append((yield from characters.take()))
    text = "".join(parts)
    if json_of(text) is None:
        raise Malformed(f"{text!r} is no value")
    return text
