"""API keys: how a request carries them, how they are compared, and the files that hold them.

A key comes as ``Authorization: Bearer`` or ``x-api-key``. A key file has one key per line; what
follows a ``#`` at a line's beginning, and empty lines, are none. Several keys let one be exchanged
without a gap: add the new one, let the callers change, take the old one away. A daemon that calls
another one sends the first.

Secrets are files that this daemon can read and not everybody can; anything else is refused, as ssh
does, because nobody notices it later.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

from msgspec import Meta

from cortex.ipc.settings import ConfigError

MIN_KEY_LENGTH = 8
LIMIT_BYTES = 64 * 1024

AbsolutePath = Annotated[
    str, Meta(pattern=r"^/[^\0]*\Z", description="an absolute path: /etc/... or the like")
]
"""What an option that names a file takes: a daemon's working directory says nothing."""


class Headers(Protocol):
    """The headers of a request, whatever library has them."""

    def getall(self, name: str, default: tuple[str, ...], /) -> Sequence[str]:
        """Return every value of *name*, whose case does not matter."""


def keys_in(headers: Headers) -> Iterator[str]:
    """Yield the keys that a request carries: with a real one, clients may send a placeholder."""
    for authorization in headers.getall("Authorization", ()):
        scheme, _, credentials = authorization.partition(" ")
        if scheme.lower() == "bearer":
            yield credentials.strip()
    yield from headers.getall("x-api-key", ())


def digest(key: str) -> bytes:
    """Return what stands for *key* where it is compared, so that time tells nothing of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_one_of(key: str, digests: Iterable[bytes]) -> bool:
    """Return whether *key* has one of *digests*, after comparing it with all of them."""
    given = digest(key)
    return sum(hmac.compare_digest(given, known) for known in digests) > 0


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in the file at *path*, at least one; raise ConfigError."""
    lines = (line.strip() for line in read_secret(path).splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} holds no key: write one per line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(f"{path}: key {number} is not printable ASCII without spaces")
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(f"{path}: key {number} has less than {MIN_KEY_LENGTH} characters")
    return keys


def read_secret(path: Path) -> str:
    """Return the text of *path*; raise ConfigError, also where everybody could read it."""
    try:
        with path.open("rb") as file:
            _refuse_public(path, os.fstat(file.fileno()).st_mode)
            content = file.read(LIMIT_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    if len(content) > LIMIT_BYTES:
        raise ConfigError(f"{path} is larger than {LIMIT_BYTES // 1024} KiB: not a file of secrets")
    try:
        return content.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"cannot read {path}: it is not UTF-8") from exc


def _refuse_public(path: Path, mode: int) -> None:
    """Raise ConfigError for a file that others may read, or group or others may write."""
    if not stat.S_ISREG(mode):
        raise ConfigError(f"cannot read {path}: it is not a file")
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        allowed = stat.filemode(mode)[1:]
        raise ConfigError(f"{path} holds a secret and has the mode {allowed}: chmod 640 or 600 it")
