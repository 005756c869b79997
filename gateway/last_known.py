"""What nodes said last of the models that they had loaded, so that a cold one is shown as it is.

Kept by the name on nodes, across restarts: without it a client would see no limit, or another one,
whenever a model has made room for others.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from typing import Self

import msgspec

from cortex.gateway.fleet import Fleet, FleetSnapshot
from cortex.gateway.state import StateFile
from cortex.gateway.written import Written
from cortex.ipc.node_api import Limit, ModelInfo


class Known(msgspec.Struct, frozen=True, omit_defaults=True):
    """What holds for all replicas of a model: the tightest limit, whatever one of them can do."""

    limit: Limit | None = None
    capabilities: list[str] = []
    tool_call: bool = False
    reasoning: bool = False

    @classmethod
    def of(cls, replicas: Iterable[ModelInfo]) -> Self | None:
        """Return what *replicas* have in common, or None where none of them is loaded."""
        loaded = [info for info in replicas if info.status in ("loaded", "recovering")]
        if not loaded:
            return None
        return cls(
            tightest(info.limit for info in loaded if info.limit),
            sorted({name for info in loaded for name in info.capabilities}),
            any(info.tool_call for info in loaded),
            any(info.reasoning for info in loaded),
        )


def tightest(limits: Iterable[Limit]) -> Limit | None:
    """Return the smallest number of each kind that is known; None where none is."""
    told = list(limits)
    if not told:
        return None
    return Limit(
        *(
            min((n for limit in told if (n := getattr(limit, kind)) is not None), default=None)
            for kind in Limit.__struct_fields__
        )
    )


class LastKnown:
    """By the name on nodes; what is loaded now replaces it."""

    def __init__(self, state: StateFile) -> None:
        self._state = state
        self._known: dict[str, Known] = {}

    async def read(self) -> None:
        """Read what earlier lives have seen; what cannot be read is as if never seen."""
        for model, value in await self._state.do(_all):
            try:
                self._known[model] = msgspec.json.decode(value, type=Known)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue

    def of(self, node_id: str) -> Known | None:
        """Return what was said last of the model."""
        return self._known.get(node_id)

    async def run(self, fleet: Fleet, written: Written) -> None:
        """Look at *fleet* as often as it is polled, for ever."""
        while True:
            self.look(fleet.snapshot())
            await asyncio.sleep(written.timeouts.poll_seconds)

    def look(self, snapshot: FleetSnapshot) -> None:
        """Note what the nodes of *snapshot* say, and write what is new."""
        replicas: dict[str, list[ModelInfo]] = {}
        for node in snapshot.nodes:
            for info in node.models if node.is_healthy else ():
                replicas.setdefault(info.id, []).append(info)
        for model, infos in replicas.items():
            known = Known.of(infos)
            if known is not None and known != self._known.get(model):
                self._keep(model, known)

    def _keep(self, model: str, known: Known) -> None:
        self._known[model] = known
        row = model, msgspec.json.encode(known)
        self._state.later(
            lambda connection: connection.execute(
                "INSERT INTO limits (model, value) VALUES (?, ?)"
                " ON CONFLICT (model) DO UPDATE SET value = excluded.value",
                row,
            )
        )


def _all(connection: sqlite3.Connection) -> list[tuple[str, bytes]]:
    return connection.execute("SELECT model, value FROM limits").fetchall()
