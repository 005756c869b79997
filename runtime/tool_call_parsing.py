"""What a parser of calls reads from, and what it says.

A parser is a generator that waits for text where it needs some: it takes ``Characters``, one after
the other, so how an answer is split does not matter to it, and says ``Calls``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any, TypeVar

from cortex.runtime.json_text import SPACE
from cortex.runtime.pieces import CallArguments, CallBegins, CallMalformed, Piece, Text

T = TypeVar("T")
Parsing = Generator[None, str, T]
"""Waits in ``yield`` for more text; "" is the end of the answer."""

Offered = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the parameters of each tool."""


class Malformed(ValueError):
    """The block is not what its format says."""


class Characters:
    """The text of a block as it comes. What was taken is remembered until it is forgotten."""

    def __init__(self) -> None:
        self._taken: list[str] = []
        self._text = ""
        """What came last; it is remembered from ``_from``, and taken up to ``_at``."""
        self._from = self._at = 0
        self._is_over = False

    @property
    def taken(self) -> str:
        """What was taken and has not been forgotten."""
        return "".join([*self._taken, self._text[self._from : self._at]])

    @property
    def ahead(self) -> str:
        """What came and has not been taken."""
        return self._text[self._at :]

    def forget(self) -> None:
        """Forget what was taken."""
        self._taken.clear()
        self._from = self._at

    def look(self, count: int) -> Parsing[str]:
        """Return the next *count* characters and leave them there; fewer if the answer ends."""
        while len(self._text) < self._at + count and not self._is_over:
            more = yield
            self._taken.append(self._text[self._from : self._at])
            self._text = self.ahead + more
            self._from = self._at = 0
            self._is_over = not more
        return self._text[self._at : self._at + count]

    def skip(self, count: int) -> None:
        """Take *count* characters that were looked at."""
        self._at += count

    def run(self, pattern: re.Pattern[str]) -> str:
        """Take what matches of what is here; how much that is must not matter."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def next_of(self, words: Collection[str], *, behind: int = 0) -> Parsing[str]:
        """Return that of *words* that comes next, or *behind* characters later; "" if none does."""
        count = 1
        while True:
            text = (yield from self.look(behind + count))[behind:]
            if text in words:
                return text
            if len(text) < count or not any(word.startswith(text) for word in words):
                return ""
            count += 1

    def peek(self) -> Parsing[str]:
        """Return the next character and leave it there; "" at the end of the answer."""
        if self._at < len(self._text):
            return self._text[self._at]
        return (yield from self.look(1))

    def take(self) -> Parsing[str]:
        """Return the next character; raise Malformed at the end of the answer."""
        character = yield from self.peek()
        if not character:
            raise Malformed("the answer ends here")
        self._at += 1
        return character

    def peek_past_space(self) -> Parsing[str]:
        """Take whitespace; return what follows and leave it there."""
        while (character := (yield from self.peek())) and character in SPACE:
            yield from self.take()
        return character

    def expect(self, text: str) -> Parsing[None]:
        """Take *text*; raise Malformed for any other."""
        for character in text:
            if (yield from self.take()) != character:
                raise Malformed(f"{text!r} is missing")


class Calls:
    """What a parser says: calls, one after the other."""

    def __init__(self, offered: Offered) -> None:
        self.offered = offered
        self.begun = 0
        self.ended = 0
        self._pieces: list[Piece] = []
        self._written: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and not ended."""
        return self.begun > self.ended

    def check(self, name: str) -> None:
        """Raise Malformed for a tool that was not offered."""
        if name not in self.offered:
            raise Malformed(f"there is no tool {name!r}")

    def begin(self, name: str) -> None:
        """Begin a call; raise Malformed for a tool that was not offered."""
        self.check(name)
        self._add(CallBegins(self.begun, f"call_{secrets.token_hex(12)}", name))
        self.begun += 1

    def write(self, arguments: str) -> None:
        """Add to the arguments of the call."""
        self._written.append(arguments)

    def end(self, characters: Characters) -> None:
        """End the call; its text is not needed any more."""
        self.ended += 1
        characters.forget()

    def spoil(self, block: str) -> None:
        """Take back the call that has begun; its number is not given again."""
        self._add(CallMalformed(self.begun - 1, block))
        self.ended += 1

    def say(self, text: str) -> None:
        """Add what belongs to no call."""
        if text:
            self._add(Text(text))

    def take(self) -> list[Piece]:
        """Return the pieces since it was asked last."""
        self._join_written()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _add(self, piece: Piece) -> None:
        self._join_written()
        self._pieces.append(piece)

    def _join_written(self) -> None:
        if text := "".join(self._written):
            self._pieces.append(CallArguments(self.begun - 1, text))
        self._written.clear()


Parser = Callable[[Characters, Calls], Parsing[None]]
