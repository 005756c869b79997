"""What the commands that ask a running gateway have in common: its client.

Also how something that goes on for a while, a load say, is told on the terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec
import orjson

from cortex.gateway import sse
from cortex.gateway.config import ENDPOINT
from cortex.gateway.errors import reason_of
from cortex.ipc.node_api import EMBEDDED_MODEL, Progress
from cortex.ipc.settings import ConfigError

CONNECT_SECONDS = 5.0
LINE_SECONDS = 5.0
MIB = 2**20

T = TypeVar("T")


class Unreachable(Exception):
    """The gateway cannot be asked, or refuses; the text says why."""


class GatewayClient:
    """Asks the gateway at *endpoint*; *key* goes along where there is one."""

    def __init__(self, endpoint: str, key: str | None) -> None:
        """Raise ConfigError for an endpoint or a key that nobody can have."""
        if not re.match(ENDPOINT, endpoint):
            raise ConfigError(f"--endpoint {endpoint!r}: expected http://HOST:PORT, without a path")
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: expected printable ASCII characters only, on one line")
        self._endpoint = endpoint.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def get(self, path: str, member: str) -> dict[str, Any]:
        """Return what ``GET path`` answers: an object with *member*; raise Unreachable."""
        answer = await self.read(path, dict[str, Any])
        if member not in answer:
            raise self._stranger()
        return answer

    async def read(self, path: str, shape: type[T]) -> T:
        """Return what ``GET path`` answers; raise Unreachable."""
        async with self._request("GET", path) as response:
            return self._typed(await response.read(), shape)

    async def post(self, path: str, body: msgspec.Struct | None, shape: type[T]) -> T:
        """Return what ``POST path`` answers; raise Unreachable."""
        said = None if body is None else msgspec.json.encode(body)
        async with self._request("POST", path, said) as response:
            return self._typed(await response.read(), shape)

    def _typed(self, body: bytes, shape: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self._stranger() from None

    def _stranger(self) -> Unreachable:
        return Unreachable(f"{self._endpoint} answers, but it is no cortex gateway")

    async def default_models(self) -> list[str]:
        """Return the models that are loaded, else all, the embedded one first.

        Raise Unreachable where there is none.
        """
        found = (await self.get("/v1/models", "data"))["data"]
        if not found:
            raise Unreachable(f"{self._endpoint} serves no model")
        loaded = [entry["id"] for entry in found if entry.get("loaded")]
        return loaded or sorted((entry["id"] for entry in found), key=EMBEDDED_MODEL.__ne__)

    async def answer(self, model: str, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """Yield the text of the next turn as it forms; raise Unreachable."""
        body = {"model": model, "messages": messages, "stream": True}
        splitter = sse.EventSplitter()
        is_complete = False
        async with self._request("POST", "/v1/chat/completions", orjson.dumps(body)) as response:
            # To the very end: whoever hangs up before counts as a client that has gone away.
            async for chunk in response.content.iter_any():
                for event in splitter.feed(chunk):
                    is_complete = is_complete or event == sse.DONE
                    if text := _text(event):
                        yield text
        if not is_complete:
            raise Unreachable("the answer broke off")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        headers = {**self._headers, "Content-Type": "application/json"} if body else self._headers
        try:
            async with (
                aiohttp.ClientSession(headers=headers, timeout=limits) as session,
                session.request(method, self._endpoint + path, data=body) as response,
            ):
                if response.status not in (200, 202):
                    raise Unreachable(self._refusal(response.status, await response.read()))
                yield response
        except aiohttp.ClientConnectorError as exc:
            why = reason_of(exc.os_error)
            raise Unreachable(f"no gateway answers at {self._endpoint}: {why}") from exc
        except aiohttp.InvalidURL as exc:
            raise Unreachable(f"--endpoint {self._endpoint!r}: nobody can be asked there") from exc
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise Unreachable(f"no gateway answers at {self._endpoint}: {exc}") from exc

    def _refusal(self, status: int, body: bytes) -> str:
        try:
            error = orjson.loads(body)["error"]
            code, words = error.get("code"), str(error["message"])
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
            return f"{self._endpoint} answered with status {status}"
        if code == "not_found":  # a neuron, say
            return str(self._stranger())
        return words


def _text(event: bytes) -> str:
    data = sse.data_of(event) or {}
    if "error" in data:
        raise Unreachable(str(data["error"].get("message")))
    choices = data.get("choices") or []
    return "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)


class LoadLines:
    """Tells of a load: a line when its phase changes, and one every five seconds meanwhile.

    Lines, not one that is drawn over: the logs of both daemons go to the same terminal.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._clock = clock
        self._phase: str | None = None
        self._said = ""
        self._said_at = -LINE_SECONDS

    def hear(self, what: str, progress: Progress | None) -> None:
        """Hear how far *what* has come."""
        phase = progress.phase if progress else None
        line = f"{what}: {progress_words(progress)}" if progress else what
        is_time = phase != self._phase or self._clock() - self._said_at >= LINE_SECONDS
        if is_time and line != self._said:
            self._phase, self._said, self._said_at = phase, line, self._clock()
            self._say(line)


def progress_words(progress: Progress) -> str:
    """Return ``downloading 40 %, 38 of 94 MB, 12 s left``, or as much of it as is known."""
    words: list[str] = [progress.phase]
    if progress.bytes_total:
        percent = 100 * progress.bytes_done // progress.bytes_total
        done, total = (count // MIB for count in (progress.bytes_done, progress.bytes_total))
        words = [f"{progress.phase} {percent} %", f"{done} of {total} MB"]
    elif progress.bytes_done:
        words.append(f"{progress.bytes_done // MIB} MB")
    if progress.eta_seconds is not None:
        words.append(f"{duration(progress.eta_seconds)} left")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
