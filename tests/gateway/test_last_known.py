"""What nodes said last of their models."""

import sqlite3
from pathlib import Path

import msgspec
import pytest

from cortex.gateway.config import Neuron
from cortex.gateway.fleet import Fleet
from cortex.gateway.last_known import Known, LastKnown, tightest
from cortex.gateway.state import StateFile
from cortex.ipc.node_api import Health, Limit, ModelInfo, ModelStatus, Servable


def info(context: int | None = 4096, status: ModelStatus = "loaded") -> ModelInfo:
    limit = Limit(context) if context else None
    return ModelInfo("m", "torch", status, [], Servable(ok=True), ["chat"], limit)


def seen(*infos: ModelInfo) -> Fleet:
    """Return a fleet in which each of *infos* is on a node of its own."""
    fleet = Fleet(Neuron(f"n{i}", f"http://n{i}:1") for i in range(len(infos)))
    for node, model in zip(fleet.snapshot().nodes, infos, strict=True):
        fleet.put(node.answered(Health(1.0), [model], {}, 1.0))
    return fleet


@pytest.mark.parametrize(
    ("limits", "least"),
    [
        ([], None),
        ([Limit(9)], Limit(9)),
        ([Limit(9, 3), Limit(8, output=5)], Limit(8, 3, 5)),
    ],
)
def test_the_tightest_limit_is_so_number_by_number(
    limits: list[Limit], least: Limit | None
) -> None:
    assert tightest(limits) == least


@pytest.mark.parametrize("status", ["loading", "failed", "unloading"])
def test_what_is_not_loaded_says_nothing(status: ModelStatus) -> None:
    assert Known.of([info(status=status)]) is None


async def test_what_was_seen_is_known_in_the_next_life(tmp_path: Path) -> None:
    async with StateFile(tmp_path / "cortex.db") as state:
        LastKnown(state).look(seen(info(512), info(256)).snapshot())
    async with StateFile(tmp_path / "cortex.db") as state:
        known = LastKnown(state)
        await known.read()

    assert known.of("m") == Known(Limit(256), ["chat"])
    assert known.of("other") is None


async def test_what_is_new_replaces_what_was_known(tmp_path: Path) -> None:
    async with StateFile(tmp_path / "cortex.db") as state:
        first = LastKnown(state)
        first.look(seen(info(512)).snapshot())
        first.look(seen(info(1024)).snapshot())
        known = LastKnown(state)
        await known.read()

    assert known.of("m") == Known(Limit(1024), ["chat"])


async def test_a_model_that_goes_stays_known(tmp_path: Path) -> None:
    async with StateFile(tmp_path / "cortex.db") as state:
        known = LastKnown(state)
        known.look(seen(info()).snapshot())
        known.look(seen(info(status="unloading")).snapshot())

    assert known.of("m") == Known(Limit(4096), ["chat"])


async def test_a_row_that_cannot_be_read_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    def spoil(connection: sqlite3.Connection) -> None:
        good = msgspec.json.encode(Known(Limit(8)))
        rows = [("a", b"{"), ("b", b"\xff"), ("c", good)]
        connection.executemany("INSERT INTO limits (model, value) VALUES (?, ?)", rows)

    async with StateFile(tmp_path / "cortex.db") as state:
        await state.do(spoil)
        known = LastKnown(state)
        await known.read()

    assert (known.of("a"), known.of("b"), known.of("c")) == (None, None, Known(Limit(8)))
