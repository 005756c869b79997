"""What must survive a restart, in one SQLite file with one owner: a thread of its own.

    <state directory>/cortex.db

Everything else in the gateway asks in memory and writes behind: ``later`` queues a change and
returns at once, ``do`` waits for an answer. Both run in the order they were asked in. A change that
cannot be written is a line in the log and no request's failure. What has been written outlives
whatever end the daemon comes to; a power cut may cost the last seconds (SQLite's write-ahead log
without a sync for each transaction).

The file belongs to one gateway: a second one that finds it taken does not start. One that is
damaged is kept beside a new one.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import structlog

from cortex.gateway.config import GatewayConfig
from cortex.ipc.settings import ConfigError

FILE = "cortex.db"
STATE_DIRECTORY = "STATE_DIRECTORY"
"""Where systemd says that a unit may keep things."""

MIGRATIONS = (
    """
    CREATE TABLE pins (model TEXT NOT NULL, node TEXT NOT NULL, PRIMARY KEY (model, node));
    CREATE TABLE drained (node TEXT PRIMARY KEY);
    CREATE TABLE footprints (key TEXT PRIMARY KEY, value BLOB NOT NULL);
    CREATE TABLE limits (model TEXT PRIMARY KEY, value BLOB NOT NULL);
    CREATE TABLE responses (
        id TEXT PRIMARY KEY, key TEXT NOT NULL, used REAL NOT NULL, value BLOB NOT NULL
    );
    CREATE TABLE usage (
        key TEXT NOT NULL, model TEXT NOT NULL, day TEXT NOT NULL,
        requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
        cached_prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        PRIMARY KEY (key, model, day)
    );
    CREATE TABLE spent (
        key TEXT NOT NULL, began INTEGER NOT NULL, tokens INTEGER NOT NULL,
        PRIMARY KEY (key, began)
    );
    """,
)
"""Each brings a file from the version of its index to the next."""

T = TypeVar("T")
log = structlog.get_logger()


class StateFile:
    """An async context manager; without a *path* everything is forgotten at its end."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._connection: sqlite3.Connection | None = None

    async def __aenter__(self) -> Self:
        """Open it; raise ConfigError where it cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._connection = await loop.run_in_executor(self._thread, _opened, self.path)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._connection is not None
        self._thread.submit(self._connection.close)
        await asyncio.to_thread(self._thread.shutdown)  # after everything that was asked before

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what *work* returns of one transaction; raise what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def later(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Do *work* in a transaction when everything before it has been done."""
        self._thread.submit(self._run_or_log, work)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        assert self._connection is not None
        with self._connection:
            return work(self._connection)

    def _run_or_log(self, work: Callable[[sqlite3.Connection], object]) -> None:
        try:
            self._run(work)
        except sqlite3.Error as exc:
            log.error("state not written", file=str(self.path), why=str(exc))  # noqa: TRY400
        except Exception:  # nobody waits for it, so nobody else would ever hear of it
            log.exception("state not written", file=str(self.path))


def state_path(config: GatewayConfig, environment: Mapping[str, str] = os.environ) -> Path:
    """Return where a daemon keeps its state."""
    if config.state.directory is not None:
        return Path(config.state.directory) / FILE
    if systemd := environment.get(STATE_DIRECTORY):
        return Path(systemd.split(":")[0]) / FILE
    home = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(home) / "cortex" / FILE


def _opened(path: Path | None) -> sqlite3.Connection:
    if path is None:
        return _migrated(sqlite3.connect(":memory:"))
    try:
        _create(path)
        return _owned(path)
    except OSError as exc:
        raise ConfigError(f"cannot keep state in {path.parent}: {exc.strerror}") from exc
    except sqlite3.OperationalError as exc:
        if "locked" in str(exc):
            raise ConfigError(f"{path} belongs to another gateway that runs") from exc
        raise ConfigError(f"cannot keep state in {path}: {exc}") from exc


def _create(path: Path) -> None:
    """Make *path* where it is not there: what is kept is nobody else's to read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):  # and then it is not opened: closing it would unlock it
        path.touch(mode=0o600, exist_ok=False)


def _owned(path: Path) -> sqlite3.Connection:
    try:
        return _locked(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as exc:
        kept = _put_aside(path)
        log.error("state was damaged, and is begun anew", why=str(exc), kept=str(kept))  # noqa: TRY400
        _create(path)
        return _locked(path)


def _put_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    path.rename(aside)
    return aside


def _locked(path: Path) -> sqlite3.Connection:
    """Return a connection that nobody can have beside us, to a file that is whole."""
    connection = sqlite3.connect(path, timeout=0.0)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
        _check(connection)
        return _migrated(connection)
    except BaseException:
        connection.close()
        raise


def _check(connection: sqlite3.Connection) -> None:
    ((found,),) = connection.execute("PRAGMA quick_check(1)").fetchall()
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def _migrated(connection: sqlite3.Connection) -> sqlite3.Connection:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ConfigError("the state was written by a newer version of the gateway")
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
    return connection
