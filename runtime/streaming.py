"""Server-sent events to one client: never silent for long, never waiting for ever.

One task writes, so nothing has to be locked, and aiohttp's drain, which cannot bear two waiters,
has one. It waits in two places, for a client that is behind and for the next event, each with a
limit; there are as many waits as tokens, so one timer serves them all (``deadline.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, Protocol, Self, TypeVar

import msgspec

from cortex.runtime.deadline import Deadline

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

    def write_at_once(self, data: bytes) -> bool:
        """Write and return True; write nothing and return False where the client is behind."""

    async def write(self, data: bytes) -> None:
        """Write, waiting while the client's buffers are full."""


class EventStream:
    """An open stream of events, made and used by one task; *cut* drops the connection."""

    def __init__(
        self,
        response: Writable,
        cut: Callable[[], None],
        *,
        patience_seconds: float = READER_PATIENCE_SECONDS,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self._response = response
        self._cut = cut
        self._patience_seconds = patience_seconds
        self._keep_alive_seconds = keep_alive_seconds
        self._clock = asyncio.get_running_loop().time
        self._deadline = Deadline()
        self._last_write = self._clock()

    async def send(self, event: object) -> None:
        """Send one event with a JSON body."""
        await self.write(b"data: %b\n\n" % msgspec.json.encode(event))

    async def comment(self, name: str, body: object) -> None:
        """Send a comment ``: name {json}``, which clients that do not know it skip."""
        await self.write(b": " + name.encode() + b" " + msgspec.json.encode(body) + b"\n\n")

    async def write(self, frame: bytes) -> None:
        """Send a whole frame; raise ConnectionResetError where the client is gone or stalls."""
        if self._response.write_at_once(frame):
            self._last_write = self._clock()
        else:
            await self._write_patiently(frame)

    async def _write_patiently(self, frame: bytes) -> None:
        self._last_write = now = self._clock()
        try:
            with self._deadline.at(now + self._patience_seconds):
                await self._response.write(frame)
        except TimeoutError:
            self._cut()
            raise ClientStalled("the client does not read") from None

    def never_silent(self, batches: AsyncIterator[T]) -> AsyncIterator[T]:
        """Yield what *batches* yields; send a comment where nothing is sent for too long.

        A batch whose text cannot be sent yet breaks no silence. The iterator's ``__anext__`` is
        cancelled and called again, so it must lose nothing by that.
        """
        return _NeverSilent(self, batches)

    @property
    def before_silence(self) -> Deadline:
        """Until when the client should get a sign of life."""
        return self._deadline.at(self._last_write + self._keep_alive_seconds)


class _NeverSilent(Generic[T]):
    """An iterator and not a generator: a generator takes a microsecond more for each token."""

    def __init__(self, stream: EventStream, batches: AsyncIterator[T]) -> None:
        self._stream = stream
        self._batches = batches

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while True:
            try:
                with self._stream.before_silence:
                    return await self._batches.__anext__()
            except TimeoutError:
                await self._stream.write(KEEP_ALIVE)
