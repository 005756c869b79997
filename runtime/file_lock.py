"""A lock that processes share, by the name of a file; the kernel gives it back if we are killed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

LOOK_SECONDS = 0.1


@contextlib.asynccontextmanager
async def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    """Hold the lock at *path*, which is created; *waiting* is called while somebody else does.

    It is the lock that the ``filelock`` library takes, so its users and we keep each other out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as lock:
            if _take(lock.fileno()) and _is_still(path, lock.fileno()):
                yield
                return
        waiting()
        await asyncio.sleep(LOOK_SECONDS)  # flock has no event to await


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether *path* names the file we locked: who held it before may have removed it."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
