"""Who has used what: requests and tokens by key, model and day, for as long as the state is kept.

What is counted is what nodes computed, once for each request and in all dialects alike: a request
that was refused is in no row. A day is one of UTC, the day on which a request ended. Whoever came
without a key is counted under ``-``, which no key can be called.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime

from cortex.gateway.state import StateFile
from cortex.gateway.tally import Tally
from cortex.ipc.fleet_api import UsageRow
from cortex.ipc.openai_answers import Usage

ADD = """
    INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key, model, day) DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_prompt_tokens = cached_prompt_tokens + excluded.cached_prompt_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens
"""
SELECT = """
    SELECT key, model, day, requests, prompt_tokens, cached_prompt_tokens, completion_tokens
    FROM usage WHERE (:key IS NULL OR key = :key) AND (:model IS NULL OR model = :model)
        AND (:since IS NULL OR day >= :since)
    ORDER BY day, key, model
"""
NO_KEY = "-"


def today() -> str:
    """Return the day in UTC, as YYYY-MM-DD."""
    return datetime.now(UTC).date().isoformat()


def cached_tokens(usage: Usage) -> int:
    """Return how many tokens of the prompt a prefix cache had."""
    details = usage.prompt_tokens_details
    return details.cached_tokens if details else 0


class Ledger:
    """Counts, and tells."""

    def __init__(self, state: StateFile, today: Callable[[], str] = today) -> None:
        self._state = state
        self._today = today
        self._tally = Tally(state, ADD)

    def count(self, key: str | None, model: str, usage: Usage) -> None:
        """Add a request of *key* that has cost *usage*."""
        self._tally.add(
            (key or NO_KEY, model, self._today()),
            1,
            usage.prompt_tokens,
            cached_tokens(usage),
            usage.completion_tokens,
        )

    async def rows(
        self, *, key: str | None = None, model: str | None = None, since: str | None = None
    ) -> list[UsageRow]:
        """Return what is counted so far, by day; None: of all. Raise sqlite3.Error."""
        wanted = {"key": key, "model": model, "since": since}

        def read(connection: sqlite3.Connection) -> list[UsageRow]:
            found = connection.execute(SELECT, wanted).fetchall()
            return [UsageRow(*row) for row in found]

        return await self._state.do(read)
