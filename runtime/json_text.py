"""The text of one JSON value, checked character by character as it comes (RFC 8259).

What has been accepted so far is always the beginning of some valid JSON text. Two things that
models get wrong are mended, because only one thing can be meant: a raw control character inside a
string is escaped, and what is still open at the end, outside of a string, can be closed.
"""

from __future__ import annotations

import json
from collections.abc import Callable

SPACE = " \t\n\r"
DIGITS = "0123456789"
ESCAPES = '"\\/bfnrt'
LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
CLOSERS = {"{": "}", "[": "]"}


class NotJson(ValueError):
    """The text cannot become JSON any more."""


class JsonText:
    """One value in the making."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._expects: Callable[[str], str] = self._value
        self._rest = ""
        """Of a literal, what must still come."""
        self._is_key = False

    @property
    def is_complete(self) -> bool:
        """Whether it is whole; of a bare number nobody knows before ``close``."""
        return self._expects == self._after and not self._open

    @property
    def is_in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._expects in {self._string, self._escape, self._hex}

    @property
    def is_in_plain_text(self) -> bool:
        """Whether text without quotes, backslashes and control characters may be left out."""
        return self._expects == self._string

    def add(self, character: str) -> str:
        """Accept one character; return it as it must be written. Raise NotJson."""
        if self.is_complete:
            raise NotJson("it is over")
        return self._expects(character)

    def close(self) -> str:
        """Return what is missing at the end; raise NotJson where that is more than brackets."""
        closable = (self._after, self._first_key, self._first_element, *self._ends_of_numbers())
        if self._expects not in closable:
            raise NotJson("it ends too early")
        missing = "".join(CLOSERS[bracket] for bracket in reversed(self._open))
        self._open.clear()
        self._expects = self._after
        return missing

    def _value(self, c: str) -> str:
        if c in SPACE:
            return c
        if c in CLOSERS:
            self._open.append(c)
            self._expects = self._first_key if c == "{" else self._first_element
        elif c == '"':
            self._is_key = False
            self._expects = self._string
        elif c in LITERALS:
            self._rest = LITERALS[c]
            self._expects = self._literal
        elif c == "-":
            self._expects = self._minus
        elif c in DIGITS:
            self._expects = self._zero if c == "0" else self._integer
        else:
            raise NotJson(f"{c!r} begins no value")
        return c

    def _first_element(self, c: str) -> str:
        return self._end(c) if c == "]" else self._value(c)

    def _first_key(self, c: str) -> str:
        return self._end(c) if c == "}" else self._key(c)

    def _key(self, c: str) -> str:
        if c == '"':
            self._is_key = True
            self._expects = self._string
        elif c in SPACE:
            self._expects = self._key if self._expects == self._key else self._first_key
        else:
            raise NotJson(f"{c!r} begins no key")
        return c

    def _colon(self, c: str) -> str:
        if c == ":":
            self._expects = self._value
        elif c not in SPACE:
            raise NotJson(f"{c!r} instead of a colon")
        return c

    def _after(self, c: str) -> str:
        """Read what follows a value."""
        self._expects = self._after
        if c in SPACE:
            return c
        if c == "," and self._open:
            self._expects = self._key if self._open[-1] == "{" else self._value
            return c
        return self._end(c)

    def _end(self, c: str) -> str:
        if not self._open or c != CLOSERS[self._open[-1]]:
            raise NotJson(f"{c!r} closes nothing")
        self._open.pop()
        self._expects = self._after
        return c

    def _string(self, c: str) -> str:
        if c == '"':
            self._expects = self._colon if self._is_key else self._after
        elif c == "\\":
            self._expects = self._escape
        elif c < " ":
            return json.dumps(c)[1:-1]
        return c

    def _escape(self, c: str) -> str:
        if c == "u":
            self._rest = "four"
            self._expects = self._hex
        elif c in ESCAPES:
            self._expects = self._string
        else:
            raise NotJson(f"\\{c} is no escape")
        return c

    def _hex(self, c: str) -> str:
        if c not in "0123456789abcdefABCDEF":
            raise NotJson(f"{c!r} is no hexadecimal digit")
        self._rest = self._rest[1:]
        if not self._rest:
            self._expects = self._string
        return c

    def _literal(self, c: str) -> str:
        if c != self._rest[0]:
            raise NotJson(f"{c!r} in a literal")
        self._rest = self._rest[1:]
        if not self._rest:
            self._expects = self._after
        return c

    # -1.5e+3: minus, zero or integer, point, fraction, exponent, its sign, its digits

    def _ends_of_numbers(self) -> tuple[Callable[[str], str], ...]:
        return (self._zero, self._integer, self._fraction, self._power)

    def _minus(self, c: str) -> str:
        return self._digit(c, self._zero if c == "0" else self._integer)

    def _zero(self, c: str) -> str:
        if c == ".":
            self._expects = self._point
        elif c in "eE":
            self._expects = self._exponent
        else:
            return self._after(c)
        return c

    def _integer(self, c: str) -> str:
        return c if c in DIGITS else self._zero(c)

    def _point(self, c: str) -> str:
        return self._digit(c, self._fraction)

    def _fraction(self, c: str) -> str:
        if c in "eE":
            self._expects = self._exponent
            return c
        return c if c in DIGITS else self._after(c)

    def _exponent(self, c: str) -> str:
        if c in "+-":
            self._expects = self._sign
            return c
        return self._digit(c, self._power)

    def _sign(self, c: str) -> str:
        return self._digit(c, self._power)

    def _power(self, c: str) -> str:
        return c if c in DIGITS else self._after(c)

    def _digit(self, c: str, then: Callable[[str], str]) -> str:
        if c not in DIGITS:
            raise NotJson(f"{c!r} in a number")
        self._expects = then
        return c


def json_of(text: str) -> str | None:
    """Return *text* as valid JSON, mended where need be; None where it is none."""
    checked = JsonText()
    try:
        written = "".join(checked.add(character) for character in text.strip(SPACE))
        return written + checked.close() if not checked.is_complete else written
    except NotJson:
        return None
