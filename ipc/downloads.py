"""What a neuron and the child process that downloads for it say to each other.

    stdin     one DownloadJob, in JSON, then the end of the file
    stdout    a Report per line: Downloaded as bytes arrive, then DownloadEnded or DownloadFailed

The job travels through a pipe and not in arguments or variables, which others on the machine can
read: it may hold a token.
"""

from __future__ import annotations

from typing import Any

import msgspec


class HubAccess(msgspec.Struct, frozen=True):
    """How to reach a Hugging Face-compatible hub."""

    endpoint: str
    """``https://host`` or ``http://host:port``, without a slash at the end."""
    token: str | None = None
    parallel_files: int = 4

    def __repr__(self) -> str:
        """Leave the token out: this ends up in logs."""
        return f"HubAccess({self.endpoint!r})"


class RepoFile(msgspec.Struct, frozen=True):
    """A file of a repository, as the hub lists it."""

    path: str
    size_bytes: int
    blob: str
    """Its name among the cache's blobs: the SHA-256 of a large file, else git's own hash."""
    sha256: str | None = None
    """Stated for large files (git LFS) only."""


class DownloadJob(msgspec.Struct, frozen=True):
    """Files of one commit that have to be in the cache."""

    access: HubAccess
    cache: str
    repo: str
    revision: str
    commit: str
    files: list[RepoFile]


class Report(msgspec.Struct, frozen=True, tag_field="op"):
    """Base of every report; subclasses add a ``tag``."""


class Downloaded(Report, frozen=True, tag="downloaded"):
    """How many bytes of all files of the job are on the disk; it never shrinks."""

    bytes_done: int


class DownloadEnded(Report, frozen=True, tag="download_ended"):
    """Every file is in the cache, whole and checked."""


class DownloadFailed(Report, frozen=True, tag="download_failed"):
    """What an Unloadable says; what is on the disk can be continued from."""

    message: str
    kind: str
    numbers: dict[str, Any] = {}


AnyReport = Downloaded | DownloadEnded | DownloadFailed
