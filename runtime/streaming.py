"""Server-sent events to one client: never silent for long, never waiting for ever.

One task writes, so nothing has to be locked, and aiohttp's drain, which cannot bear two waiters,
has one. Silence is broken by whoever waits for the next event (``batches_and_silences``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol, TypeVar

import msgspec

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE_SECONDS = 0.8  # a harness was seen to give up after one second of silence
READER_PATIENCE_SECONDS = 30.0

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else nginx collects the stream
}


class ClientStalled(ConnectionResetError):
    """The client read nothing for too long; its connection is cut."""


class Writable(Protocol):
    """What we need of a response."""

    async def write(self, data: bytes) -> None:
        """Write, waiting while the client's buffers are full."""


class EventStream:
    """An open stream of events; *cut* drops the connection."""

    def __init__(
        self,
        response: Writable,
        cut: Callable[[], None],
        patience_seconds: float = READER_PATIENCE_SECONDS,
    ) -> None:
        self._response = response
        self._cut = cut
        self._patience_seconds = patience_seconds
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()

    @property
    def silent_seconds(self) -> float:
        """How long ago the last frame was written."""
        return self._loop.time() - self._last_write

    async def send(self, event: object) -> None:
        """Send one event with a JSON body."""
        await self.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def comment(self, name: str, body: object) -> None:
        """Send a comment ``: name {json}``, which clients that do not know it skip."""
        await self.write(b": " + name.encode() + b" " + msgspec.json.encode(body) + b"\n\n")

    async def write(self, frame: bytes) -> None:
        """Send a whole frame; raise ConnectionResetError where the client is gone or stalls."""
        self._last_write = self._loop.time()
        try:
            async with asyncio.timeout(self._patience_seconds):
                await self._response.write(frame)
        except TimeoutError:
            self._cut()
            raise ClientStalled("the client does not read") from None


async def batches_and_silences(
    batches: AsyncIterator[T], seconds_left: Callable[[], float]
) -> AsyncGenerator[T | None]:
    """Yield what *batches* yields, and None where none comes for *seconds_left*.

    It is asked before every batch: a batch whose text cannot be sent yet breaks no silence. The
    iterator's ``__anext__`` is cancelled and called again, so it must lose nothing by that.
    """
    while True:
        try:
            async with asyncio.timeout(seconds_left()):
                batch = await anext(batches)
        except TimeoutError:
            yield None
        except StopAsyncIteration:
            return
        else:
            yield batch
