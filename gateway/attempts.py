"""What the nodes have said to one request so far, and whether another one is asked; pure.

    before a byte of an answer has gone to the client     what follows
    it is full, or cannot now: 429, 503                   another replica
    it could not be reached                               another replica; where there is none and
                                                          no node has heard of the request, the
                                                          model is placed anew
    it broke                                              another replica; after the second none:
                                                          it may be this request that breaks them
    a stream stayed silent: neurons never do              the same
    it does not have the model, though it was seen        what is known of it is asked anew, once:
    there, or is only loading it                          the model may have to be loaded again
    anything else                                         that is the client's answer

When nobody is left to ask, the client gets the most useful of their answers: one that says when to
come back, the soonest of those, before one that does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cortex.gateway.circuit_breaker import is_failure
from cortex.gateway.routing import Serve
from cortex.gateway.upstream import Unreachable
from cortex.ipc.errors import ApiError

MAX_ATTEMPTS = 8
MAX_BREAKS = 2
NOT_NOW = frozenset({429, 503})
STALE = frozenset({"model_loading", "model_not_found"})
"""Codes of nodes of which something else was known."""

Step = Literal["answer", "look again", "another"]


@dataclass(frozen=True)
class Attempt:
    """A node that was asked in vain."""

    replica: Serve
    error: ApiError


@dataclass
class Attempts:
    """Those of one request, which wants a stream or not, in their order."""

    wants_stream: bool
    made: list[Attempt] = field(default_factory=list)
    has_looked_again: bool = False

    @property
    def tried(self) -> frozenset[str]:
        """The names of the nodes."""
        return frozenset(attempt.replica.node.name for attempt in self.made)

    @property
    def has_reached_nobody(self) -> bool:
        """Whether no node has got the request."""
        return all(isinstance(attempt.error, Unreachable) for attempt in self.made)

    def after(self, replica: Serve, error: ApiError) -> Step:
        """Note that *replica* has failed with *error*; return what to do now."""
        self.made.append(Attempt(replica, error))
        if error.code in STALE and not self.has_looked_again:
            self.has_looked_again = True
            return "look again"
        breaks = sum(_has_broken(attempt.error) for attempt in self.made)
        is_spent = len(self.made) >= MAX_ATTEMPTS or breaks >= MAX_BREAKS
        return "answer" if is_spent or not self._is_forgiven(error) else "another"

    def answer(self) -> Attempt:
        """Return the one whose error the client gets."""
        if not self._is_forgiven(self.made[-1].error):
            return self.made[-1]
        return min(reversed(self.made), key=_rank)

    def _is_forgiven(self, error: ApiError) -> bool:
        if error.code == "node_timeout":
            return self.wants_stream
        return error.status in NOT_NOW or is_failure(error)


def _has_broken(error: ApiError) -> bool:
    return is_failure(error) and not isinstance(error, Unreachable)


def _rank(attempt: Attempt) -> tuple[bool, float]:
    seconds = attempt.error.retry_after_seconds
    return attempt.error.status not in NOT_NOW, math.inf if seconds is None else seconds
