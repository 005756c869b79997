"""Tasks that live no longer than a block: the daemon's, or those beside one request.

A TaskGroup that can be left while its tasks still run: they are cancelled then. A task that fails
ends the block it belongs to, so that no exception is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Background:
    """An async context manager; entered and left by the same task."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run *work* beside everything else."""
        _ = self.task(work, name)

    def task(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start *work* whose result somebody will await."""
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in list(self._tasks):
            task.cancel()
        if kind is asyncio.CancelledError:  # perhaps by a task of ours that failed
            await self._group.__aexit__(kind, error, traceback)
        else:  # an error of the block is not the group's to wrap
            await self._group.__aexit__(None, None, None)
