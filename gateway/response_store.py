"""The responses that clients may go on from, or look at again: bounded, and kept over a restart.

    one row a response    its object, with the output, and the items that came in with it
    a conversation        a chain of them: each names the one before

Who goes on from a response makes its whole chain young again; beyond ``[responses]`` the oldest go,
whosesoever they are. What another key has stored is not there. Everything is in memory, and written
behind.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cortex.gateway.state import StateFile
from cortex.gateway.written import Written
from cortex.ipc.errors import InvalidRequest, PreviousResponseNotFound, ResponseNotFound

ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_\w+")
"""As ``Outline.item_id`` makes them; the response can be told from it."""


class Stored(msgspec.Struct, frozen=True):
    """One response, the items that came in with its request, and those that went out."""

    id: str
    previous: str | None
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]
    rest: msgspec.Raw
    """The response without its output, which only those need who look at it."""

    @property
    def items(self) -> list[dict[str, Any]]:
        """What it has added to its conversation."""
        return [*self.input, *self.output]

    @property
    def response(self) -> dict[str, Any]:
        """The object."""
        rest: dict[str, Any] = msgspec.json.decode(self.rest)
        return {**rest, "output": self.output}


@dataclass(frozen=True)
class Row:
    """A response as it is kept: whose it is, and a ``Stored`` as JSON."""

    key: str
    value: bytes


class ResponseStore:
    """All of them, of all keys; bodies are decoded in threads, so a lock guards the rows."""

    def __init__(self, state: StateFile, written: Written) -> None:
        self._state = state
        self._written = written
        self._rows: OrderedDict[str, Row] = OrderedDict()  # the oldest first
        self._bytes = 0
        self._lock = threading.Lock()

    async def read(self) -> None:
        """Take up what was stored when the gateway stopped; raise sqlite3.Error."""
        for name, key, value in await self._state.do(_read):
            self._put(name, Row(key, value))
        self._forget(self._displaced())

    def of(self, key_id: str | None) -> OwnResponses:
        """Return those that the key *key_id*, or nobody, has stored."""
        return OwnResponses(self, key_id or "")

    @property
    def stores(self) -> bool:
        """Whether the operator lets anything be stored."""
        limits = self._written.config.responses
        return limits.max_stored > 0 and limits.max_stored_mb > 0

    def put(self, name: str, row: Row) -> None:
        """Keep *row*, and let the oldest go for it."""
        with self._lock:
            self._put(name, row)
            displaced = self._displaced()
        values = (name, row.key, time.time(), row.value)
        self._state.later(
            lambda connection: connection.execute(
                "INSERT INTO responses (id, key, used, value) VALUES (?, ?, ?, ?)", values
            )
        )
        self._forget(displaced)

    def get(self, name: str, key: str) -> Stored | None:
        """Return the response *name* if *key* has stored it."""
        row = self._rows.get(name)
        if row is None or row.key != key:
            return None
        return msgspec.json.decode(row.value, type=Stored)

    def rejuvenate(self, names: list[str]) -> None:
        """Make *names*, of which the first is the oldest, the youngest."""
        with self._lock:
            for name in names:
                if name in self._rows:
                    self._rows.move_to_end(name)
        used = time.time()
        self._state.later(
            lambda connection: connection.executemany(
                "UPDATE responses SET used = ? WHERE id = ?", [(used, name) for name in names]
            )
        )

    def drop(self, name: str) -> None:
        """Forget the response *name*."""
        with self._lock:
            row = self._rows.pop(name, None)  # another request may have displaced it just now
            self._bytes -= len(row.value) if row else 0
        self._forget([name])

    def _put(self, name: str, row: Row) -> None:
        self._rows[name] = row
        self._bytes += len(row.value)

    def _displaced(self) -> list[str]:
        """Drop the oldest rows beyond the limits, and return their names."""
        limits, displaced = self._written.config.responses, []
        while self._rows and (
            len(self._rows) > limits.max_stored or self._bytes > limits.max_stored_mb * 2**20
        ):
            name, row = self._rows.popitem(last=False)
            self._bytes -= len(row.value)
            displaced.append(name)
        return displaced

    def _forget(self, names: list[str]) -> None:
        if names:
            self._state.later(
                lambda connection: connection.executemany(
                    "DELETE FROM responses WHERE id = ?", [(name,) for name in names]
                )
            )


def _read(connection: sqlite3.Connection) -> list[tuple[str, str, bytes]]:
    return connection.execute(
        "SELECT id, key, value FROM responses ORDER BY used, rowid"
    ).fetchall()


@dataclass(frozen=True)
class OwnResponses:
    """The responses of one key, for as long as one request lasts."""

    store: ResponseStore
    key: str
    _items: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By their ids, of each response that one has been looked up in: many may be in the same."""

    def one(self, name: str) -> Stored:
        """Return the response *name*; raise ResponseNotFound."""
        stored = self.store.get(name, self.key)
        if stored is None:
            raise ResponseNotFound(f"there is no response {name!r} here", param="id")
        return stored

    def drop(self, name: str) -> None:
        """Forget the response *name*; raise ResponseNotFound."""
        self.one(name)
        self.store.drop(name)

    def conversation(self, last: str) -> list[dict[str, Any]]:
        """Return the items of the conversation that ends with the response *last*.

        Raise PreviousResponseNotFound where it, or one before it, is not stored any more.
        """
        chain: list[Stored] = []
        name: str | None = last
        while name is not None:
            stored = self.store.get(name, self.key)
            if stored is None:
                raise _broken(last, name)
            chain.append(stored)
            name = stored.previous
        chain.reverse()
        self.store.rejuvenate([stored.id for stored in chain])
        return [item for stored in chain for item in stored.items]

    def item(self, item_id: str, place: str) -> dict[str, Any]:
        """Return the stored item that *item_id*, at *place* in a request, refers to.

        Raise InvalidRequest where there is none.
        """
        found = ITEM_ID.fullmatch(item_id)
        items = self._items_of(f"resp_{found[1]}") if found else {}
        if item_id in items:
            return items[item_id]
        raise InvalidRequest(
            f"{place}: there is no item {item_id!r} here; those of a response with 'store': false "
            f"are not kept",
            param=f"{place}.id",
        )

    def _items_of(self, name: str) -> dict[str, dict[str, Any]]:
        if name not in self._items:
            stored = self.store.get(name, self.key)
            self._items[name] = {item["id"]: item for item in stored.items} if stored else {}
        return self._items[name]

    def keep(self, response: dict[str, Any], items: msgspec.Raw) -> None:
        """Store *response*, and the *items* that came in with its request."""
        rest = dict(response)
        stored = {
            "id": response["id"],
            "previous": response["previous_response_id"],
            "input": items,
            "output": rest.pop("output"),
            "rest": rest,
        }
        self.store.put(response["id"], Row(self.key, msgspec.json.encode(stored)))


def _broken(last: str, missing: str) -> PreviousResponseNotFound:
    why = (
        "it was never stored here, or has been dropped"
        if last == missing
        else f"{missing!r}, earlier in its conversation, has been dropped"
    )
    return PreviousResponseNotFound(
        f"cannot go on from the response {last!r}: {why}; send the whole conversation as 'input'",
        param="previous_response_id",
    )
