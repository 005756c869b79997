"""One thing that a client does, and what may come of it.

    outcome        means
    pass           it works as that client needs it
    fail           it does not: the gateway, a node or an engine says something else on the wire
    not possible   it is refused in words: the model, or this version, does not do that
    not tried      it would take too long, or cannot be told from outside

A client can be used when nothing fails, and nothing that it must have is impossible. What is judged
is the wire, not the sense: a small model may say anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from cortex.gateway.doctor_wire import Wire

Outcome = Literal["pass", "fail", "not possible", "not tried"]


CONTEXT_UNKNOWN = "the context of the model is not known"


class Wrong(Exception):
    """What came is not what the client needs; the text says why."""


class NotPossible(Exception):
    """It was refused in words, which are the text."""


class NotTried(Exception):
    """It was left out; the text says why."""


@dataclass(frozen=True)
class Subject:
    """The model that is asked, and how the gateway shows it."""

    model: str
    context_tokens: int | None
    """None: not known."""
    ids: tuple[str, ...]
    """Of all models."""


Run = Callable[[Wire, Subject], Awaitable[str]]
"""Returns what was seen, in a few words; raises one of the three above."""


@dataclass(frozen=True)
class Check:
    """One of them."""

    name: str
    run: Run
    is_needed: bool = True
    """Whether the client is of no use without it."""


class Finding(msgspec.Struct, frozen=True):
    """What came of a check."""

    client: str
    check: str
    outcome: Outcome
    why: str
    seconds: float
    needed: bool

    @property
    def is_bad(self) -> bool:
        """Whether the client cannot be used for it."""
        return self.outcome == "fail" or (self.needed and self.outcome == "not possible")


def room_for(own_tokens: int, needed_tokens: int) -> Check:
    """Return whether the context holds *needed_tokens*: a prompt of its own, and room to work in.

    That prompt, with a short question, has about *own_tokens*.
    """

    async def fits(wire: Wire, subject: Subject) -> str:
        del wire
        context = subject.context_tokens
        if context is None:
            raise NotTried(CONTEXT_UNKNOWN)
        if context < needed_tokens:
            raise NotPossible(
                f"the context is {context} tokens: its own prompt has about {own_tokens}, and with "
                f"room to work in it needs {needed_tokens}"
            )
        return f"{context} tokens"

    return Check("context", fits)


def need(condition: object, words: str) -> None:
    """Raise Wrong with *words* unless *condition* holds."""
    if not condition:
        raise Wrong(words)
