"""Asks a Hugging Face-compatible hub: what a repository holds, and any bytes of its files.

    GET /api/models/{repo}/revision/{revision}           the commit
    GET /api/models/{repo}/tree/{commit}?recursive=true  files and sizes, in pages (Link: rel=next)
    GET /{repo}/resolve/{commit}/{path}                  bytes, perhaps by way of another host

The token goes to the endpoint alone: on the way to another host aiohttp drops it. What may pass is
tried again, a bounded number of times and ever more slowly, or when ``Retry-After`` says: broken
connections, silence, 429 and 5xx. A file goes on from the byte that was reached.

    kind                   what is wrong
    network_unreachable    nobody answers, or nobody went on answering
    rate_limited           still 429 in the end, or asked to wait for longer than anybody wants to
    hub_failed             still 5xx in the end, or an answer that no hub gives
    unauthorized           401: a token is needed, or another one
    gated                  403: its owner has to let this token in
    repo_not_found, revision_not_found, file_not_found
    checksum_mismatch      a file is not as long as was said

Every one of them is an Unloadable whose message is one sentence.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from cortex.ipc.downloads import HubAccess, RepoFile
from cortex.ipc.errors import Unloadable
from cortex.ipc.version import BUILD
from cortex.runtime.hub_answers import (
    HASH,
    Entry,
    content_range,
    meaning,
    retry_after_seconds,
    why,
)
from cortex.runtime.hub_files import HubSource, Listing

MAX_LISTING_BYTES = 32 * 2**20
MAX_PAGES = 1000
READ_BYTES = 2**20
PROGRESS_BYTES = 2**20
"""A connection that brought this much before it broke does not count as a failed attempt."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Patience:
    """When to try again, and when to give up."""

    attempts: int = 6
    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    longest_asked_seconds: float = 300.0
    """Whoever asks for a longer pause is not waited for."""
    connect_seconds: float = 10.0
    silence_seconds: float = 30.0

    def pause_seconds(self, failures: int, asked_seconds: float | None) -> float:
        """Return how long to wait after so many *failures* in a row."""
        if asked_seconds is not None:
            return asked_seconds
        doubled = self.first_seconds * 2.0 ** (failures - 1)
        return min(self.longest_seconds, doubled) * random.uniform(0.75, 1.0)  # noqa: S311


class Passing(Exception):
    """Something that may be over when tried again; ``refusal`` is what it is if it never is."""

    def __init__(self, refusal: Unloadable, retry_after_seconds: float | None = None) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.retry_after_seconds = retry_after_seconds


class HubClient:
    """One hub; an async context manager. Every call may raise Unloadable."""

    def __init__(
        self, access: HubAccess, patience: Patience = Patience(), sleep: Sleep = asyncio.sleep
    ) -> None:
        self._access = access
        self._patience = patience
        self._sleep = sleep
        self._headers = {
            "User-Agent": f"cortex-neuron/{BUILD.package_version}",
            "Accept-Encoding": "identity",  # so that lengths and ranges count a file's own bytes
        }
        if access.token:
            self._headers["Authorization"] = f"Bearer {access.token}"
        self._proxy = _proxy_for(access.endpoint)

    async def __aenter__(self) -> Self:
        limits = aiohttp.ClientTimeout(
            total=None,
            sock_connect=self._patience.connect_seconds,
            sock_read=self._patience.silence_seconds,
        )
        self._session = aiohttp.ClientSession(
            timeout=limits, auto_decompress=False, read_bufsize=READ_BYTES
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def listing(self, source: HubSource) -> Listing:
        """Return what *source* holds now."""
        model = f"{self._access.endpoint}/api/models/{source.repo}"
        about, _ = await self._json(f"{model}/revision/{quote(source.revision, safe='')}", source)
        commit = about.get("sha") if isinstance(about, dict) else None
        if not isinstance(commit, str) or not HASH.fullmatch(commit):
            raise self._no_hub(f"names no commit of {source}")
        files: dict[str, RepoFile] = {}
        query: str | None = "recursive=true&expand=false"
        for _ in range(MAX_PAGES):
            entries, query = await self._json(f"{model}/tree/{commit}?{query}", source)
            files |= self._files(entries, source)
            if query is None:
                return Listing(commit, files)
        raise self._no_hub(f"lists {source} without an end")

    async def read(self, source: HubSource, commit: str, file: RepoFile, count: int) -> bytes:
        """Return the first *count* bytes of *file*, or all of a shorter one."""
        count = min(count, file.size_bytes)
        data = bytearray()
        async for chunk in self.chunks(source, commit, file, 0, count):
            data += chunk
        return bytes(data)

    async def chunks(
        self, source: HubSource, commit: str, file: RepoFile, start: int, stop: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of *file* from *start* to *stop*, whatever happens on the way."""
        url = f"{self._access.endpoint}/{source.repo}/resolve/{commit}/{quote(file.path)}"
        at, failures = start, 0
        while at < stop:
            began = at
            try:
                async with self._get(url, source, {"Range": f"bytes={at}-{stop - 1}"}) as response:
                    async for chunk in _wanted(response, file, at, stop):
                        at += len(chunk)
                        yield chunk
                if at < stop:
                    raise self._broken("the connection was closed too early")
            except Passing as exc:
                failures = 1 if at - began >= PROGRESS_BYTES else failures + 1
                await self._pause(exc, failures)

    async def _json(self, url: str, source: HubSource) -> tuple[Any, str | None]:
        """Return what *url* says, and the query of the next page."""
        for failures in itertools.count(1):
            try:
                async with self._get(url, source, {}) as response:
                    body = await _whole(response)
                    return self._decoded(body, source), self._next_page(response, source)
            except Passing as exc:
                await self._pause(exc, failures)
        raise AssertionError  # the pause gives up

    def _decoded(self, body: bytes, source: HubSource) -> Any:
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise self._no_hub(f"says no JSON of {source}") from exc

    def _next_page(self, response: aiohttp.ClientResponse, source: HubSource) -> str | None:
        """Return the query of the next page; its host is not kept: mirrors name another."""
        try:
            link = response.links.get("next")
        except ValueError as exc:
            raise self._no_hub(f"names no place for the next page of {source}") from exc
        return None if link is None else urlsplit(str(link["url"])).query

    async def _pause(self, exc: Passing, failures: int) -> None:
        """Wait before the next attempt; raise the refusal after the last."""
        asked = exc.retry_after_seconds
        too_long = asked is not None and asked > self._patience.longest_asked_seconds
        if failures >= self._patience.attempts or too_long:
            raise exc.refusal from exc
        await self._sleep(self._patience.pause_seconds(failures, asked))

    @asynccontextmanager
    async def _get(
        self, url: str, source: HubSource, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open *url*; raise Passing, or Unloadable for what trying again does not change."""
        try:
            async with self._session.get(
                url, headers={**self._headers, **headers}, proxy=self._proxy
            ) as response:
                if response.status not in (200, 206):
                    raise self._refused(response, source)
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise self._broken(why(exc)) from exc

    def _broken(self, why: str) -> Passing:
        return Passing(
            Unloadable(
                f"the hub {self._access.endpoint} cannot be reached: {why}",
                kind="network_unreachable",
            )
        )

    def _no_hub(self, why: str) -> Unloadable:
        return Unloadable(f"{self._access.endpoint} {why}", kind="hub_failed")

    def _refused(self, response: aiohttp.ClientResponse, source: HubSource) -> Exception:
        """Return what the status means."""
        status, code = response.status, response.headers.get("X-Error-Code", "")
        hub = self._access.endpoint
        if status == 429 or status >= 500:
            kind = "rate_limited" if status == 429 else "hub_failed"
            refusal = Unloadable(f"the hub {hub} answers {status} for {source}", kind=kind)
            return Passing(refusal, retry_after_seconds(response.headers.get("Retry-After")))
        words, kind = meaning(status, code, source, has_token=self._access.token is not None)
        return Unloadable(f"the hub {hub} {words}", kind=kind, status=status)

    def _files(self, entries: Any, source: HubSource) -> dict[str, RepoFile]:
        try:
            listed = msgspec.convert(entries, list[Entry])
        except msgspec.ValidationError as exc:
            raise self._no_hub(f"lists {source} as no hub does: {exc}") from exc
        files = [entry.file() for entry in listed if entry.type == "file"]
        return {file.path: file for file in files if file is not None}


async def _wanted(
    response: aiohttp.ClientResponse, file: RepoFile, start: int, stop: int
) -> AsyncIterator[bytes]:
    """Yield the bytes from *start* on, also of an answer that begins before them."""
    skip, left = start, stop - start
    if response.status == 206:
        begins, total = content_range(response.headers.get("Content-Range", ""))
        _refuse_other_size(file, total)
        if begins != start:
            raise Passing(Unloadable(f"{file.path}: another range came", kind="hub_failed"))
        skip = 0
    else:
        _refuse_other_size(file, response.content_length)
    async for chunk in response.content.iter_chunked(READ_BYTES):
        kept = chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))
        if kept:
            yield kept[:left]
            left -= len(kept)
        if left <= 0:
            return


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(READ_BYTES):
        data += chunk
        if len(data) > MAX_LISTING_BYTES:
            raise Unloadable("the hub's listing is absurdly long", kind="hub_failed")
    return bytes(data)


def _refuse_other_size(file: RepoFile, total: int | None) -> None:
    if total is not None and total != file.size_bytes:
        raise Unloadable(
            f"{file.path} is {total} bytes long, but the hub lists it with {file.size_bytes}",
            kind="checksum_mismatch",
            expected=file.size_bytes,
            got=total,
        )


def _proxy_for(endpoint: str) -> str | None:
    """Return the proxy that the environment names for *endpoint*, as pip and curl read it."""
    parts = urlsplit(endpoint)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)
