"""The figures of scripts/bench-engine: medians, ratios round by round, a table. No I/O."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "ours"


@dataclass(frozen=True)
class Spread:
    """A median, and what lay around it."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return that of *values*, of which there is at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def plain(self) -> dict[str, float]:
        """Return it as JSON has it."""
        return {"median": self.median, "least": self.least, "most": self.most}


@dataclass
class Results:
    """What was measured: by row, by engine, by round. Rows are in the order of their arrival."""

    values: dict[str, dict[str, dict[int, float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why there is no figure, by row and engine."""
    bandwidths: list[float] = field(default_factory=list)
    choosing_shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of the seconds of a step, those in which tokens were chosen, by engine where it tells."""
    versions: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, row: str, engine: str, number: int, value: float) -> None:
        """Note a value of round *number*."""
        self.values[row][engine][number] = value

    def spread(self, row: str, engine: str) -> Spread | None:
        """Return an engine's figure, if there is one."""
        found = self.values[row].get(engine)
        return Spread.of(list(found.values())) if found else None

    def ratio(self, row: str, peer: str) -> Spread | None:
        """Return ours divided by the peer's, of the rounds that both were in."""
        ours, theirs = self.values[row].get(OURS, {}), self.values[row].get(peer, {})
        ratios = [ours[number] / theirs[number] for number in ours if number in theirs]
        return Spread.of(ratios) if ratios else None


def table(results: Results, peers: Sequence[str]) -> Iterator[str]:
    """Yield the lines that show *results*."""
    heads = "".join(f"{peer:>14}{'ours / it (least to most)':>28}" for peer in peers)
    yield f"{'':<24}{OURS:>12}{heads}"
    for row in results.values:
        line = f"{row:<24}{_number(results.spread(row, OURS)):>12}"
        for peer in peers:
            line += (
                f"{_number(results.spread(row, peer)):>14}{_ratio(results.ratio(row, peer)):>28}"
            )
        yield line
    for (row, engine), why in results.left_out.items():
        yield f"{row}: without {engine}: {why}"
    for engine, shares in results.choosing_shares.items():
        share = statistics.median(shares)
        yield f"{engine}: choosing among the logits took {share:.2%} of its decode steps"
    yield from results.remarks


def plain(results: Results, peers: Sequence[str]) -> dict[str, Any]:
    """Return *results* as JSON has them."""
    rows: dict[str, Any] = {}
    for row in results.values:
        engines = {each: results.spread(row, each) for each in (OURS, *peers)}
        ratios = {peer: results.ratio(row, peer) for peer in peers}
        rows[row] = {
            **{each: found.plain() for each, found in engines.items() if found},
            "ratios": {peer: found.plain() for peer, found in ratios.items() if found},
        }
    return {
        "rows": rows,
        "left_out": {f"{row}, {engine}": why for (row, engine), why in results.left_out.items()},
        "bandwidth_bytes": Spread.of(results.bandwidths).plain() if results.bandwidths else None,
        "choosing_shares": {
            engine: statistics.median(shares) for engine, shares in results.choosing_shares.items()
        },
        "versions": results.versions,
        "remarks": results.remarks,
    }


def _number(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:,.0f}" if spread.median >= 100 else f"{spread.median:,.2f}"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.2f} ({spread.least:.2f} to {spread.most:.2f})"
