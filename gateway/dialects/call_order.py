"""Parts of calls, which a node may tell all at once, as one call after the other; pure.

A client has one call open at a time, and may run it as soon as that is closed. So a call that
begins while the arguments of the one before are not yet whole waits until they must be: for the end
of the answer, or for words behind the calls.

    node      0: {"a":    1: {"b":    0: 1}    1: 2}    end
    client    0: {"a":                0: 1}             1: {"b":    1: 2}

What nodes do as a rule, one whole call after the other, is told as it comes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cortex.ipc.errors import NodeFailed

Json = dict[str, Any]

NOTHING = ("", "{}")
"""What an engine may add to a call without arguments when all has been said."""


class CallOrder:
    """The calls of one answer."""

    def __init__(self) -> None:
        self._number: int | None = None
        """Of the call that is told now."""
        self._arguments: list[str] = []
        """What it has said so far."""
        self._over: set[int] = set()
        """The numbers of those that were told before."""
        self._waiting: list[Json] = []

    def take(self, parts: list[Json]) -> list[Json]:
        """Return those *parts* of calls that are told now; raise NodeFailed for one too late."""
        return [part for part in parts if self._is_next(part)]

    def rest(self) -> list[Json]:
        """Return what has waited, call by call; all calls there have been are over then."""
        waiting, self._waiting = sorted(self._waiting, key=number_of), []
        self._over.update(map(number_of, waiting))
        self._leave()
        return waiting

    def _is_next(self, part: Json) -> bool:
        number, said = number_of(part), arguments_of(part)
        if number in self._over:
            if said.strip() in NOTHING:
                return False
            raise NodeFailed("the node went on with a call that had ended")
        if number != self._number and not self._may_begin():
            self._waiting.append(part)
            return False
        if number != self._number:
            self._leave()
            self._number = number
        self._arguments.append(said)
        return True

    def _may_begin(self) -> bool:
        """Whether another call may be told now."""
        if self._waiting:  # and then it is not read again what the first one has said
            return False
        return self._number is None or is_whole("".join(self._arguments))

    def _leave(self) -> None:
        if self._number is not None:
            self._over.add(self._number)
        self._number, self._arguments = None, []


def is_whole(arguments: str) -> bool:
    """Whether the *arguments* of a call are JSON, to which nothing can be added."""
    try:
        msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return False
    return True


def number_of(part: Json) -> int:
    """Return the number of the call that *part* belongs to."""
    number: int = part.get("index", 0)
    return number


def arguments_of(part: Json) -> str:
    """Return what *part* adds to the arguments of its call."""
    return (part.get("function") or {}).get("arguments") or ""
