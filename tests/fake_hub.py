"""A Hugging Face-compatible hub on loopback, which breaks where a test tells it to.

It has what real clients ask for: revisions, listings in pages, files with ranges, redirects of
large files to another host (``localhost`` instead of ``127.0.0.1``), git's hashes and LFS's.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

COMMIT = "a" * 40
LARGE = (".safetensors", ".gguf", ".bin", "tokenizer.json")


@dataclass(frozen=True)
class Received:
    """A request."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None


@dataclass
class Manner:
    """How the content of a file is answered, request by request."""

    cuts: list[int] = field(default_factory=list)
    """The connection breaks after so many bytes; one number per request, then no more."""
    stops: list[int] = field(default_factory=list)
    """The same, but it goes silent, until ``FakeHub.may_go_on``."""
    stated_sha256: str | None = None
    """What the listing says instead of the truth."""
    stated_size: int | None = None
    ignores_ranges: bool = False
    content_range: str | None = None
    """Said instead of the truth."""
    replaced_by: bytes | None = None
    """Sent instead of the content."""


class FakeHub:
    """A hub; an async context manager. *repos* maps names to files."""

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {name: dict(files) for name, files in repos.items()}
        self.commit = COMMIT
        self.token: str | None = None
        """Needed where set."""
        self.is_gated = False
        self.says_why = True
        """Whether errors carry X-Error-Code."""
        self.page = 1000
        self.pages_at: str | None = None
        """Where the next page is said to be, instead of here."""
        self.listing: Any = None
        """Instead of the true one; bytes are sent as they are."""
        self.redirects = False
        self.failures: list[tuple[int, dict[str, str]]] = []
        """Status and headers that the next requests get instead of an answer."""
        self.manners: defaultdict[str, Manner] = defaultdict(Manner)
        self.received: list[Received] = []
        self.may_go_on = asyncio.Event()
        self.is_silent = asyncio.Event()
        """Set when an answer has stopped in its middle."""

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port: int = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.may_go_on.set()
        await self._runner.cleanup()

    def contents(self, path: str) -> list[Received]:
        """Return the requests for the content of a file, of whichever host."""
        return [one for one in self.received if one.path.endswith(f"/{path}")]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.received.append(
            Received(
                request.method,
                request.path_qs,
                request.host,
                request.headers.get("Range"),
                request.headers.get("Authorization"),
            )
        )
        if self.failures:
            status, headers = self.failures.pop(0)
            return web.Response(status=status, headers=headers)
        path = request.path
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._refusal(request, *found.groups()) or web.json_response(
                {"id": found[1], "sha": self.commit}
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self._refusal(request, *found.groups()) or self._page(request, found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._refusal(request, found[1], found[2]) or await self._file(
                request, found[1], found[3]
            )
        if path.startswith("/elsewhere/"):
            _, _, org, name, file = path.split("/", 4)
            return await self._content(request, f"{org}/{name}", file)
        return web.Response(status=404)

    def _refusal(self, request: web.Request, repo: str, revision: str) -> web.Response | None:
        if repo not in self.repos:
            return self._error(401 if self.says_why else 404, "RepoNotFound")
        if revision not in {"main", "v1", "refs/pr/1", self.commit}:
            return self._error(404, "RevisionNotFound")
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._error(401, "")
        return self._error(403, "GatedRepo") if self.is_gated else None

    def _error(self, status: int, code: str) -> web.Response:
        headers = {"X-Error-Code": code} if self.says_why and code else {}
        return web.Response(status=status, headers=headers)

    def _page(self, request: web.Request, repo: str) -> web.Response:
        if isinstance(self.listing, bytes):
            return web.Response(body=self.listing)
        if self.listing is not None:
            return web.json_response(self.listing)
        start = int(request.query.get("cursor", "0"))
        entries = self.entries(repo)
        headers = {}
        if start + self.page < len(entries):
            query = f"recursive=true&cursor={start + self.page}"
            headers["Link"] = f'<{self.pages_at or self.url}{request.path}?{query}>; rel="next"'
        return web.json_response(entries[start : start + self.page], headers=headers)

    def entries(self, repo: str) -> list[dict[str, Any]]:
        """Return the listing of *repo*."""
        return [{"type": "directory", "path": "1_Pooling", "oid": "0" * 40, "size": 0}] + [
            self._entry(path, data) for path, data in self.repos[repo].items()
        ]

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        manner = self.manners[path]
        size = manner.stated_size if manner.stated_size is not None else len(data)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": git_hash(data)}
        if path.endswith(LARGE):
            sha256 = manner.stated_sha256 or hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 130}
        return entry

    async def _file(self, request: web.Request, repo: str, path: str) -> web.StreamResponse:
        if path not in self.repos[repo]:
            return self._error(404, "EntryNotFound")
        entry = self._entry(path, self.repos[repo][path])
        known = {
            "ETag": f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"',
            "X-Repo-Commit": self.commit,
        }
        if self.redirects and "lfs" in entry and request.method == "GET":
            where = f"http://localhost:{self._port}/elsewhere/{repo}/{path}"
            return web.Response(status=302, headers={**known, "Location": where})
        return await self._content(request, repo, path, known)

    async def _content(
        self, request: web.Request, repo: str, path: str, headers: Mapping[str, str] = {}
    ) -> web.StreamResponse:
        manner = self.manners[path]
        data = self.repos[repo][path] if manner.replaced_by is None else manner.replaced_by
        start, stop, status = 0, len(data), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        extra = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(data))}
        if found and not manner.ignores_ranges:
            start = int(found[1])
            stop = min(int(found[2]) + 1, len(data)) if found[2] else len(data)
            if start >= len(data):
                return web.Response(status=416)
            status = 206
            said = manner.content_range or f"bytes {start}-{stop - 1}/{len(data)}"
            extra["Content-Range"] = said
            extra["Content-Length"] = str(stop - start)
        response = web.StreamResponse(status=status, headers=extra)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await self._send(response, manner, data[start:stop])
        return response

    async def _send(self, response: web.StreamResponse, manner: Manner, body: bytes) -> None:
        if manner.cuts:
            await response.write(body[: manner.cuts.pop(0)])
            assert response._req is not None
            assert response._req.transport is not None
            response._req.transport.close()
            return
        if manner.stops:
            count = manner.stops.pop(0)
            await response.write(body[:count])
            self.is_silent.set()
            await self.may_go_on.wait()
            body = body[count:]
        await response.write(body)


def git_hash(data: bytes) -> str:
    """Return git's hash of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
