"""Who has used what, by key, model and day."""

import re
from pathlib import Path

from cortex.gateway.ledger import Ledger, today
from cortex.gateway.state import FILE, StateFile
from cortex.ipc.fleet_api import UsageRow
from cortex.ipc.openai_answers import PromptTokensDetails, Usage

SMALL = Usage(7, 2, 9, PromptTokensDetails(3))


async def test_requests_of_one_key_model_and_day_are_one_row() -> None:
    async with StateFile(None) as state:
        ledger = Ledger(state, lambda: "2026-03-01")
        ledger.count("boss", "qwen3-8b", SMALL)
        ledger.count("boss", "qwen3-8b", Usage(10, 1, 11))

        rows = await ledger.rows()

    assert rows == [UsageRow("boss", "qwen3-8b", "2026-03-01", 2, 17, 3, 3)]


async def test_rows_are_told_apart_and_sorted_by_day_key_and_model() -> None:
    days = iter(["2026-03-02", "2026-03-01", "2026-03-01", "2026-03-01"])
    async with StateFile(None) as state:
        ledger = Ledger(state, days.__next__)
        for key, model in [("a", "m"), ("b", "m"), ("a", "n"), (None, "m")]:
            ledger.count(key, model, SMALL)

        rows = [(row.day, row.key, row.model) for row in await ledger.rows()]

    assert rows == [
        ("2026-03-01", "-", "m"),
        ("2026-03-01", "a", "n"),
        ("2026-03-01", "b", "m"),
        ("2026-03-02", "a", "m"),
    ]


async def test_rows_are_found_by_key_model_and_day() -> None:
    days = iter(["2026-03-01", "2026-03-02", "2026-03-03"])
    async with StateFile(None) as state:
        ledger = Ledger(state, days.__next__)
        for key, model in [("a", "m"), ("a", "n"), (None, "m")]:
            ledger.count(key, model, SMALL)

        async def found(**wanted: str) -> list[str]:
            return [row.day[-2:] for row in await ledger.rows(**wanted)]

        assert await found(key="a") == ["01", "02"]
        assert await found(key="-") == ["03"]
        assert await found(model="m") == ["01", "03"]
        assert await found(since="2026-03-02") == ["02", "03"]
        assert await found(key="a", model="n", since="2026-03-01") == ["02"]
        assert await found(key="nobody") == []


async def test_counting_goes_on_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        async with StateFile(tmp_path / FILE) as state:
            Ledger(state, lambda: "2026-03-01").count("a", "m", SMALL)

    async with StateFile(tmp_path / FILE) as state:
        (row,) = await Ledger(state).rows()
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (2, 14, 4)


def test_a_day_is_written_as_in_iso_8601() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today())
