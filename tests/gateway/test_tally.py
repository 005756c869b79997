"""Sums that are written behind."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from cortex.gateway.budgets import ADD
from cortex.gateway.state import FILE, StateFile
from cortex.gateway.tally import Tally

Work = Callable[[sqlite3.Connection], object]


class QueuedState:
    """Keeps what is to be done until the test does it."""

    def __init__(self) -> None:
        self.queued: list[Work] = []

    def later(self, work: Work) -> None:
        self.queued.append(work)


def rows(connection: sqlite3.Connection) -> list[Any]:
    return connection.execute("SELECT key, began, tokens FROM spent ORDER BY key").fetchall()


async def test_what_many_add_is_written_in_one_transaction() -> None:
    queued = QueuedState()
    tally = Tally(cast(StateFile, queued), ADD)

    for _ in range(100):
        tally.add(("a", 0), 2)
        tally.add(("b", 0), 1)

    assert len(queued.queued) == 1
    async with StateFile(None) as state:
        await state.do(queued.queued[0])
        assert await state.do(rows) == [("a", 0, 200), ("b", 0, 100)]


async def test_what_comes_after_a_write_asks_for_another() -> None:
    queued = QueuedState()
    tally = Tally(cast(StateFile, queued), ADD)

    async with StateFile(None) as state:
        for _ in range(3):
            tally.add(("a", 0), 1)
            await state.do(queued.queued.pop())

        assert await state.do(rows) == [("a", 0, 3)]


async def test_what_could_not_be_written_goes_with_what_comes_next(
    logged: list[dict[str, Any]],
) -> None:
    async with StateFile(None) as state:
        tally = Tally(state, ADD)
        await state.do(lambda connection: connection.execute("PRAGMA query_only = 1"))
        tally.add(("a", 0), 1)
        await state.do(lambda connection: connection.execute("PRAGMA query_only = 0"))
        tally.add(("a", 0), 2)

        assert await state.do(rows) == [("a", 0, 3)]

    assert [entry["event"] for entry in logged] == ["state not written"]


async def test_sums_go_on_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        async with StateFile(tmp_path / FILE) as state:
            Tally(state, ADD).add(("a", 0), 5)

    async with StateFile(tmp_path / FILE) as state:
        assert await state.do(rows) == [("a", 0, 10)]
