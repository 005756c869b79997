"""Sums that are written behind: what many requests add goes into the file in one transaction.

    add, add, add      the event loop: into a queue; the first of them asks for a write
    write              the thread of the state file: empties the queue, adds up, writes, commits

What could not be written, on a full disk say, is kept and goes with what comes next.
"""

from __future__ import annotations

import operator
import sqlite3
from collections import deque

from cortex.gateway.state import StateFile

Of = tuple[str | int, ...]
"""What a sum is of: the columns of a table's primary key."""
Amounts = tuple[int, ...]
"""What is added to its other columns."""


class Tally:
    """One table of sums; *upsert* adds one row to it."""

    def __init__(self, state: StateFile, upsert: str) -> None:
        self._state = state
        self._upsert = upsert
        self._added: deque[tuple[Of, Amounts]] = deque()
        self._unwritten: dict[Of, Amounts] = {}
        """Only the thread of the state file touches it."""
        self._is_asked_for = False

    def add(self, of: Of, *amounts: int) -> None:
        """Add *amounts* to the sums of *of*."""
        self._added.append((of, amounts))
        if not self._is_asked_for:
            self._is_asked_for = True
            self._state.later(self._write)

    def _write(self, connection: sqlite3.Connection) -> None:
        self._is_asked_for = False  # before the queue is emptied: what comes now asks again
        while self._added:
            of, amounts = self._added.popleft()
            before = self._unwritten.get(of)
            self._unwritten[of] = tuple(map(operator.add, before, amounts)) if before else amounts
        connection.executemany(
            self._upsert, [(*of, *amounts) for of, amounts in self._unwritten.items()]
        )
        connection.commit()  # not before it is certain may it be forgotten
        self._unwritten.clear()
