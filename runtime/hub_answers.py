"""What a hub's answers say: statuses, headers, and the rows of a listing. Pure.

A status below 500 that is no success is a refusal for good, in words and as a kind; the hub says
more of it in ``X-Error-Code``, which mirrors leave out.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable

import aiohttp
import msgspec

from cortex.ipc.downloads import RepoFile
from cortex.runtime.hub_files import HubSource
from cortex.runtime.wheel import is_plain

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Git's hash of a small file or of a commit, the SHA-256 of a large file."""


def meaning(status: int, code: str, source: HubSource, *, has_token: bool) -> tuple[str, str]:
    """Return in words, and as a kind, what a status below 500 says."""
    who = "this token" if has_token else "anybody without a token"
    see_option = "see token_file in [sources.huggingface]"
    if status == 404 and not code:  # a hub that does not say what it misses
        code = "RepoNotFound" if source.revision == "main" else "RevisionNotFound"
    match status, code:
        case _, "RepoNotFound":
            words = f"has no repository {source.repo}, or does not show it to {who}"
            kind = "repo_not_found"
        case _, "RevisionNotFound":
            words, kind = f"has no {source.revision!r} of {source.repo}", "revision_not_found"
        case (_, "GatedRepo") | (403, _):
            words = f"does not let {who} into {source.repo}: its owner has to give access there"
            kind = "gated"
        case 401, _:
            why = "refuses the token" if has_token else "asks for a token"
            words, kind = f"{why} for {source.repo}: {see_option}", "unauthorized"
        case 404, _:
            words, kind = f"lists a file of {source} that it does not have", "file_not_found"
        case 416, _:
            words, kind = f"has less of a file of {source} than it lists", "checksum_mismatch"
        case _:
            words, kind = f"answers {status} for {source}", "hub_failed"
    return words, kind


def why(exc: Exception) -> str:
    """Return in words how a connection failed."""
    match exc:
        case aiohttp.ClientConnectorError():
            return exc.os_error.strerror or str(exc.os_error)
        case TimeoutError():
            return "it does not answer in time"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            return "the connection broke"
        case _:
            return str(exc) or type(exc).__name__


def retry_after_seconds(header: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return how long ``Retry-After`` asks to wait: seconds, or a date."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    date = email.utils.parsedate_tz(header)
    try:
        return max(0.0, email.utils.mktime_tz(date) - now()) if date else None
    except (ValueError, OverflowError):  # a day that is in no calendar
        return None


def content_range(header: str) -> tuple[int, int | None]:
    """Return where ``bytes 5-9/10`` begins, and the size of the whole where it is said."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
    if found is None:
        return -1, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


class Large(msgspec.Struct, frozen=True):
    """What a row says of a file in git LFS."""

    oid: str
    size: int


class Entry(msgspec.Struct, frozen=True):
    """A row of the listing."""

    path: str
    type: str = "file"
    size: int = 0
    oid: str = ""
    lfs: Large | None = None

    def file(self) -> RepoFile | None:
        """Return it, None where its names could lead out of the cache."""
        blob = self.lfs.oid.removeprefix("sha256:") if self.lfs else self.oid
        size = self.lfs.size if self.lfs else self.size
        if not is_plain(self.path) or not HASH.fullmatch(blob) or size < 0:
            return None
        return RepoFile(self.path, size, blob, blob if self.lfs else None)
