"""A connection that sends any bytes, and reads an answer of HTTP: what no client library does.

Every step is under a deadline, so a server that hangs fails the test that asks it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, cast

import msgspec

DEADLINE_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """One answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object."""
        return cast(dict[str, Any], self.json["error"])

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and code."""
        return self.status, self.error["code"]


class Wire:
    """An open connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send *data*, also where nobody reads it any more."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_SECONDS):
                self._writer.write(data)
                await self._writer.drain()

    async def answer(self) -> Answer:
        """Read one answer, of a known length or in chunks."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            pairs = (line.partition(":") for line in lines)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            if headers.get("transfer-encoding") == "chunked":
                body = b"".join([chunk async for chunk in self._chunks()])
            else:
                body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(first.split()[1]), headers, body)

    async def lines(self, count: int) -> None:
        """Read so many lines, of whatever comes."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            for _ in range(count):
                await self._reader.readline()

    async def closed(self) -> bool:
        """Return whether the server ends the connection, and says nothing more before."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            try:
                return not await self._reader.read()
            except ConnectionResetError:
                return True

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)


@contextlib.asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    """Connect to *port* on loopback."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def head(method: str, target: str, *headers: str) -> bytes:
    """Return the head of a request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def post(target: str, body: bytes, headers: Iterable[str] = ()) -> bytes:
    """Return a whole POST."""
    return head("POST", target, f"Content-Length: {len(body)}", *headers) + body
