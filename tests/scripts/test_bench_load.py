"""What scripts/bench-load measures, on files of one small layer."""

from __future__ import annotations

from pathlib import Path

import bench_load
import pytest
from bench_load import make_ways, measure, table


def test_it_loads_beside_cat_what_was_quantised_and_then_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_load, "HIDDEN", 256)
    monkeypatch.setattr(bench_load, "MIDDLE", 512)
    monkeypatch.setattr(bench_load, "VOCABULARY", 128)
    every = make_ways(tmp_path, dense_bytes=0)
    ways = {name: every[name] for name in ("q8_0 while loading", "q8_0 kept")}

    rows = measure(ways, 1, has_cold=False)

    first, second = rows["q8_0 while loading, warm"], rows["q8_0 kept, warm"]
    assert first["seconds"] > 0 < first["cat_seconds"]
    assert first["weights_mb"] == second["weights_mb"] > 0
    assert len(table(rows)) == 2 + len(ways)
