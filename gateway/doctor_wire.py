"""What the doctor says to a gateway and hears from it, as bytes: no library of a client is between.

Connections that break, and answers that do not come, are answers of status 0: a check then says so.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import msgspec
import orjson

from cortex.gateway import sse
from cortex.gateway.terminal import CONNECT_SECONDS

Json = dict[str, Any]
EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Event:
    """One event of a stream."""

    name: str | None
    data: Json


@dataclass
class Reply:
    """An answer; of a stream its events, as far as they were read."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    events: list[Event] = field(default_factory=list)
    keep_alives: int = 0
    """Comments and pings."""
    is_done: bool = False
    """``[DONE]`` came."""
    first_seconds: float = 0.0
    """Until the first byte of the body."""
    longest_silence_seconds: float = 0.0

    @property
    def json(self) -> Json:
        """The body as a JSON object; an empty one where it is none."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def error(self) -> Json:
        """The error object, of either dialect; an empty one where there is none."""
        error = self.json.get("error")
        return error if isinstance(error, dict) else {}

    @property
    def refusal(self) -> str:
        """What was said instead of an answer, in one line."""
        words = self.error.get("message") or self.body[:160].decode("utf-8", "replace")
        return f"{self.status or 'no answer'}: {words}"


class Wire:
    """Asks the gateway at *endpoint*; *headers* go along with every request."""

    def __init__(self, endpoint: str, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint.rstrip("/")
        self.headers = headers
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(timeout=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, **headers: str) -> Reply:
        """Return the answer to a GET; an underscore in a name of *headers* is a dash."""
        return await self.ask("GET", path, None, _dashed(headers))

    async def post(self, path: str, body: Json, **headers: str) -> Reply:
        """Return the answer to a POST; where that is a stream, all of it."""
        return await self.ask("POST", path, body, _dashed(headers))

    async def ask(
        self,
        method: str,
        path: str,
        body: Json | None,
        headers: Mapping[str, str],
        enough: Callable[[Reply], bool] = lambda _: False,
    ) -> Reply:
        """Return the answer; hang up on a stream as soon as there is *enough* of it.

        A header without a value is not sent, also where it goes along with every other request.
        """
        reply = Reply(0)
        try:
            async with self._request(method, path, body, headers) as response:
                reply.status, reply.headers = response.status, response.headers
                if response.content_type == EVENT_STREAM:
                    await _read_events(response, reply, enough)
                else:
                    reply.body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as exc:
            reply.status, reply.body = 0, f"the connection broke: {exc}".encode()
        return reply

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Json | None, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        sent = {name: value for name, value in {**self.headers, **headers}.items() if value}
        if body is not None:
            sent["Content-Type"] = "application/json"
        data = None if body is None else msgspec.json.encode(body)
        async with self._session.request(
            method, self._endpoint + path, data=data, headers=sent
        ) as response:
            yield response


def _dashed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


async def _read_events(
    response: aiohttp.ClientResponse, reply: Reply, enough: Callable[[Reply], bool]
) -> None:
    splitter = sse.EventSplitter()
    begin = last = time.monotonic()
    async for chunk in response.content.iter_any():
        now = time.monotonic()
        reply.first_seconds = reply.first_seconds or now - begin
        reply.longest_silence_seconds = max(reply.longest_silence_seconds, now - last)
        last = now
        for block in splitter.feed(chunk):
            _take(block, reply)
        if enough(reply):
            return


def _take(block: bytes, reply: Reply) -> None:
    name, _, data = block.rpartition(b"\n")
    if sse.is_comment(block):
        reply.keep_alives += 1
    elif data == sse.DONE:
        reply.is_done = True
    elif (said := sse.data_of(data)) is not None:
        event = Event(name.removeprefix(b"event: ").decode("utf-8", "replace") or None, said)
        reply.keep_alives += said.get("type") == "ping"
        reply.events.append(event)
