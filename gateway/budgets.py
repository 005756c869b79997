"""What a key may still use: tokens of its budget, and requests at the same time.

    reserve   before any node is asked: the prompt's estimate and all that the answer may have, or
              where the client has not limited it what it usually has and what is left at most
    settle    at the end: what it has really cost, or an estimate where its client left before the
              node could say (``usage.py``); nothing where nothing was computed

Tokens that are reserved count as spent, so that requests side by side cannot exceed a budget
together. They can exceed it by what an estimate was too small: where a client sets no limit to its
answer, or writes what takes more tokens than a quarter of its bytes.

A budget without ``per_seconds`` is a balance: what is spent stays spent, until the operator writes
a higher number. With it, what was spent comes back after so many seconds; it is remembered in
sixtieths of that time, each of which comes back as a whole, late rather than early. Both are kept
across restarts. A key's budget begins with the first request after it was given.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cortex.gateway.auth import Principal
from cortex.gateway.catalogue import Target
from cortex.gateway.config import Budget
from cortex.gateway.dialects.dialect import Call
from cortex.gateway.fleet import Fleet
from cortex.gateway.state import StateFile
from cortex.gateway.tally import Tally
from cortex.ipc.errors import ApiError, InsufficientQuota, RateLimitExceeded

BYTES_PER_TOKEN = 4
"""Of a body, about; its JSON makes up for what text takes more."""
OUTPUT_TOKENS = 4096
"""Of an answer that the client has not limited, unless the model's own limit is lower."""
PARTS = 60
"""Of a window."""
FOR_EVER = 0
"""When what a balance has spent began, so to speak."""

ADD = """
    INSERT INTO spent VALUES (?, ?, ?)
    ON CONFLICT (key, began) DO UPDATE SET tokens = tokens + excluded.tokens
"""


def prompt_estimate(body_bytes: int) -> int:
    """Return about how many tokens the prompt in a body of *body_bytes* has."""
    return math.ceil(body_bytes / BYTES_PER_TOKEN)


@dataclass
class Account:
    """What one key has spent, by when that began (seconds since the epoch); pure."""

    spent: dict[int, int] = field(default_factory=dict)
    reserved: int = 0
    in_flight: int = 0

    def spent_of(self, budget: Budget, now: float) -> int:
        """Return the tokens that count against *budget* at *now*."""
        if budget.per_seconds is None:
            return self.spent.get(FOR_EVER, 0)
        return sum(n for began, n in self.spent.items() if _comes_back(budget, began) > now)

    def left(self, budget: Budget, now: float) -> int:
        """Return the tokens that are neither spent nor kept; less than 0 where it is overdrawn."""
        return budget.tokens - self.spent_of(budget, now) - self.reserved

    def refusal(self, principal: Principal, tokens: int, now: float) -> ApiError | None:
        """Return why *principal* may not begin a request that may take *tokens*, or None."""
        most, budget = principal.max_in_flight, principal.budget
        if most is not None and self.in_flight >= most:
            return RateLimitExceeded(
                f"the key {principal.key_id!r} has {self.in_flight} requests running, of {most} "
                "that it may have at the same time",
                retry_after_seconds=1,
            )
        if budget is None:
            return None
        if tokens <= self.left(budget, now):
            return None
        why = (
            f"this request may take {tokens} tokens; of the {budget.tokens} that the key "
            f"{principal.key_id!r} has, {self.spent_of(budget, now)} are spent and {self.reserved} "
            "are kept for requests that run"
        )
        if tokens > budget.tokens:
            why += "; it never has so many: a smaller max_tokens, or a shorter prompt, takes less"
        if budget.per_seconds is None:
            return InsufficientQuota(why)
        wait = self._wait_seconds(budget, tokens, now)
        return RateLimitExceeded(
            f"{why}; spent ones come back after {budget.per_seconds} s", retry_after_seconds=wait
        )

    def _wait_seconds(self, budget: Budget, tokens: int, now: float) -> int:
        """Return after how long enough has come back, if what runs costs next to nothing."""
        missing = self.spent_of(budget, now) + tokens - budget.tokens
        ends = now
        for began in sorted(self.spent):
            if missing > 0 and (ends_then := _comes_back(budget, began)) > now:
                missing -= self.spent[began]
                ends = ends_then
        if missing > 0:  # more than the whole budget: it will never do
            ends = now + (budget.per_seconds or 0)
        return max(1, math.ceil(ends - now))

    def spend(self, budget: Budget, tokens: int, now: float) -> int:
        """Note *tokens* as spent at *now*; return what they are noted under."""
        began = FOR_EVER
        if budget.per_seconds is not None:
            began = int(now) - int(now) % _part_seconds(budget)
            for old in [old for old in self.spent if old != FOR_EVER]:
                if _comes_back(budget, old) <= now:
                    del self.spent[old]
        self.spent[began] = self.spent.get(began, 0) + tokens
        return began


def _part_seconds(budget: Budget) -> int:
    assert budget.per_seconds is not None
    return max(1, budget.per_seconds // PARTS)


def _comes_back(budget: Budget, began: int) -> float:
    """Return when what was spent in the part of a window that *began* then counts no longer."""
    assert budget.per_seconds is not None
    return began + _part_seconds(budget) + budget.per_seconds


class Reservation:
    """One request's place among those of its key, and the tokens kept for it."""

    def __init__(self, budgets: Budgets, principal: Principal, tokens: int) -> None:
        self._budgets = budgets
        self._principal = principal
        self._tokens = tokens

    def settle(self, tokens: int) -> None:
        """Give back what was kept and spend *tokens*; called once."""
        self._budgets.settle(self._principal, self._tokens, tokens)


class Budgets:
    """The accounts of all keys; those who come without one share one that nothing limits."""

    def __init__(
        self, state: StateFile, fleet: Fleet, clock: Callable[[], float] = time.time
    ) -> None:
        self._state = state
        self._fleet = fleet
        self._clock = clock
        self._accounts: dict[str | None, Account] = {}
        self._tally = Tally(state, ADD)

    async def read(self) -> None:
        """Read what was spent before; raise sqlite3.Error."""
        rows = await self._state.do(_spent)
        for key, began, tokens in rows:
            self._account(key).spent[began] = tokens

    def reserve(self, principal: Principal, call: Call, target: Target) -> Reservation:
        """Return the place of *call* among the requests of its key.

        Raise RateLimitExceeded and InsufficientQuota.
        """
        account, now, tokens = self._account(principal.key_id), self._clock(), 0
        if principal.budget:
            tokens = self._may_take(call, target, account.left(principal.budget, now))
        if refusal := account.refusal(principal, tokens, now):
            raise refusal
        account.reserved += tokens
        account.in_flight += 1
        return Reservation(self, principal, tokens)

    def settle(self, principal: Principal, reserved: int, spent: int) -> None:
        """Give back what was *reserved*, and note what was *spent* instead."""
        account = self._account(principal.key_id)
        account.in_flight -= 1
        account.reserved -= reserved
        if principal.budget and principal.key_id and spent:
            known = set(account.spent)
            began = account.spend(principal.budget, spent, self._clock())
            self._tally.add((principal.key_id, began), spent)
            if gone := known - set(account.spent):
                self._forget(principal.key_id, max(gone))

    def in_flight(self, key: str) -> int:
        """Return how many requests of *key* run."""
        return self._account(key).in_flight

    def told(self, key: str, budget: Budget) -> dict[str, int]:
        """Return the numbers of *key* that operators look at, in tokens."""
        account = self._account(key)
        return {
            "tokens": budget.tokens,
            "spent_tokens": account.spent_of(budget, self._clock()),
            "reserved_tokens": account.reserved,
        }

    def _account(self, key: str | None) -> Account:
        return self._accounts.setdefault(key, Account())

    def _forget(self, key: str, last: int) -> None:
        self._state.later(
            lambda connection: connection.execute(
                "DELETE FROM spent WHERE key = ? AND began > ? AND began <= ?",
                (key, FOR_EVER, last),
            )
        )

    def _may_take(self, call: Call, target: Target, left: int) -> int:
        """Return the tokens to keep for *call*, of those that are *left*."""
        # What the node gets: with it comes what a response goes on from, say.
        prompt = prompt_estimate(len(call.body(target.node_id)))
        if call.path == "/v1/embeddings":
            return prompt
        if call.output_limit is not None:
            return prompt + call.output_limit
        return prompt + max(min(self._usual_output(target), left - prompt), 1)

    def _usual_output(self, target: Target) -> int:
        profile = target.profile
        told = [profile.limit.output] if profile and profile.limit else []
        told += [
            model.limit.output
            for node in self._fleet.snapshot().nodes
            if (model := node.model(target.node_id)) and model.limit
        ]
        return min(next(filter(None, told), OUTPUT_TOKENS), OUTPUT_TOKENS)


def _spent(connection: sqlite3.Connection) -> list[tuple[str, int, int]]:
    return connection.execute("SELECT key, began, tokens FROM spent").fetchall()
