"""A server in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self


class OwnThread:
    """A context manager; ``url`` is where the server is, once ``serve`` has said so.

    What inherits from it serves in ``serve``: it sets ``url``, and then awaits ``until_over``.
    """

    def __init__(self) -> None:
        self.url = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over: asyncio.Event | None = None
        self._is_served = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_served.wait(30), "the server does not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._loop is not None
        assert self._is_over is not None
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    async def serve(self) -> None:
        """Serve until it is over."""
        raise NotImplementedError

    async def until_over(self) -> None:
        """Let clients come, and return when they have gone."""
        assert self._is_over is not None
        self._is_served.set()
        await self._is_over.wait()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Do *work* where it serves; raise what that raises."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _run(self) -> None:
        self._loop, self._is_over = asyncio.get_running_loop(), asyncio.Event()
        await self.serve()
