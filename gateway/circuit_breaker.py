"""Closes a node to new requests when it breaks what it is given; pure, takes a clock.

A node may answer every poll and break every request, so polls alone do not tell.

    state        what it means                            what ends it
    closed       requests go there                        so many failures in a row
    open         none does                                some seconds
    half_open    one request tries it, and another one    a success closes it, a failure opens it
                 once that is being answered or gone,
                 or has taken as long as it was open

A success at any time closes it. A refusal in words is neither: the node has understood.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cortex.ipc.errors import ApiError

BreakerState = Literal["closed", "open", "half_open"]

BREAKS = frozenset({"node_failed", "node_timeout"})
REFUSALS = frozenset({429, 503})


def is_failure(error: ApiError) -> bool:
    """Whether *error* is the node's failing, by its code; an odd refusal may lack another one."""
    return error.code in BREAKS and error.status >= 500 and error.status not in REFUSALS


@dataclass(frozen=True)
class Breaker:
    """One node's; ``failures`` are those in a row, times those of the caller's clock."""

    failures: int = 0
    opened_at: float | None = None
    open_seconds: float = 0.0
    tried_at: float | None = None
    """When the request went there that tries it."""

    def state(self, now: float) -> BreakerState:
        """Return the state at *now*."""
        if self.opened_at is None:
            return "closed"
        return "open" if now < self.opened_at + self.open_seconds else "half_open"

    def seconds_closed_to_requests(self, now: float) -> float:
        """Return for how long no request may go there; 0: one may now."""
        begun = [at for at in (self.opened_at, self.tried_at) if at is not None]
        return max(max(begun, default=now) + self.open_seconds - now, 0.0)

    def asked(self, now: float) -> Breaker:
        """A request goes there: where it is not closed, as a trial."""
        return self if self.opened_at is None else replace(self, tried_at=now)

    def left(self) -> Breaker:
        """The trial is being answered, or has ended and told nothing: another may follow."""
        return self if self.tried_at is None else replace(self, tried_at=None)

    def worked(self) -> Breaker:
        """A request has got all of its answer."""
        return CLOSED

    def failed(self, now: float, limit: int, open_seconds: float) -> Breaker:
        """A request was broken: the *limit*-th in a row opens it for *open_seconds*."""
        failures = self.failures + 1
        if self.opened_at is None and failures < limit:
            return replace(self, failures=failures)
        return Breaker(failures, now, open_seconds)


CLOSED = Breaker()
