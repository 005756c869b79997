"""The sequences of one request, read as one stream of (choice, batch of records).

One sequence is read as it is. Several are read by a task each, which waits until its batch is
taken: a client that does not read is noticed by each generation, as ever. Leaving the context
cancels what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self

from cortex.ipc.ring import TokenRecord
from cortex.runtime.node import TokenStream

Batch = tuple[int, list[TokenRecord]]


class Choices(Protocol):
    """An async iterator of batches; cancelling its ``__anext__`` loses nothing."""

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Iterate over the batches."""

    async def __anext__(self) -> Batch:
        """Return the next batch of any choice; raise what any of them fails with."""

    def cancel(self, index: int) -> None:
        """End one choice, which has said enough."""


@contextlib.asynccontextmanager
async def generating(
    count: int, start: Callable[[int], AbstractAsyncContextManager[TokenStream]]
) -> AsyncIterator[Choices]:
    """Run *count* sequences, which *start* starts one by one."""
    async with contextlib.AsyncExitStack() as running:
        streams = [await running.enter_async_context(start(index)) for index in range(count)]
        if count == 1:
            yield _One(streams[0])
            return
        failure: Exception | None = None
        async with asyncio.TaskGroup() as tasks:
            merged = _Several(streams)
            pumps = [tasks.create_task(merged.pump(index)) for index in range(count)]
            try:
                yield merged
            except Exception as exc:  # noqa: BLE001  # to leave it as it is, ungrouped
                failure = exc
            finally:
                for pump in pumps:
                    pump.cancel()
        if failure is not None:
            raise failure


class _One:
    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        return 0, await self._stream.__anext__()

    def cancel(self, index: int) -> None:
        del index
        self._stream.cancel()


class _Several:
    def __init__(self, streams: list[TokenStream]) -> None:
        self._streams = streams
        self._left = len(streams)
        self._queue: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(len(streams))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        while self._left:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item
            self._left -= 1
        raise StopAsyncIteration

    def cancel(self, index: int) -> None:
        self._streams[index].cancel()

    async def pump(self, index: int) -> None:
        """Hand over the batches of one stream, then None, or what it fails with."""
        try:
            async for records in self._streams[index]:
                await self._queue.put((index, records))
        except Exception as exc:  # noqa: BLE001  # the reader raises it
            await self._queue.put(exc)
        else:
            await self._queue.put(None)
