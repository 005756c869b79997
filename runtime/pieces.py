"""What an answer is made of, as it forms: text, reasoning, and calls of tools.

A reader (``tool_calls.py``, ``reasoning.py``) turns the raw text of one answer into pieces; whoever
speaks a dialect (``completions.py``) turns pieces into its events. Calls are numbered from 0 in
order of appearance, and the pieces of one call are never mixed with another's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Words to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Words that the model says to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A tool is called; ``id`` is ours and unique."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next characters of the call's arguments, which are the text of one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallMalformed:
    """The call that began is none: its arguments cannot become JSON.

    ``block`` is what was read of it; what follows of it is Text. An answer that does not stream
    shows the block as text; a stream cannot take back what it has sent, and ends with an error.
    """

    index: int
    block: str


Piece = Text | Reasoning | CallBegins | CallArguments | CallMalformed


class Reader(Protocol):
    """Reads one answer."""

    @property
    def is_in_call(self) -> bool:
        """Whether a call has begun and not ended; behind ``flush``, whether one was cut."""

    def add(self, text: str) -> list[Piece]:
        """Return the pieces that became final with *text*."""

    def flush(self, *, ended: bool = False) -> list[Piece]:
        """Return what was held back; the answer is over.

        *ended* says that the model itself came to an end: closing brackets that it left out are
        then put in. Else the answer was cut; a call that had begun is then what came of it.
        """


class PlainReader:
    """Reads an answer that is nothing but text."""

    is_in_call = False

    def add(self, text: str) -> list[Piece]:
        """Return it as it is."""
        return [Text(text)] if text else []

    def flush(self, *, ended: bool = False) -> list[Piece]:  # noqa: ARG002 - the protocol's
        """Nothing is held back."""
        return []
