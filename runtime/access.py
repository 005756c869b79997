"""Who may use this node: whoever knows one of its keys; without a key file, whoever reaches it.

Without one, web pages of elsewhere are kept out (``ipc/web_pages.py``).

There is one rule and no exception: with a key file, nothing is answered without a key. Not
``/health`` and ``/metrics`` either, which name models and tell what they do; a probe without a key
sees a 401, which says that the node is up. So what ``x-cortex-`` headers say is heard only from
who knows the key, the gateway; without a key file everybody is trusted with more than that.

SIGHUP reads keys and certificate again; what is broken stays as it was, and is said to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from cortex.ipc.errors import InvalidApiKey, InvalidRequest
from cortex.ipc.keys import Headers, digest, is_one_of, keys_in, read_keys
from cortex.ipc.node_api import HEADER_KEY, HEADER_PRIORITY
from cortex.ipc.settings import ConfigError
from cortex.ipc.web_pages import OpenDaemon, asked_by, check_not_foreign
from cortex.runtime.config import NeuronConfig
from cortex.runtime.tls import Certificate

log = structlog.get_logger()

CALLER = web.RequestKey("caller", str)
"""The id of the key that somebody showed to the gateway, where it says so; never the secret."""

MOST_URGENT: Final = 10
"""Priorities go from minus this to this; 0 is everybody's."""
_FIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,9}")


class NodeKeys:
    """The keys in a file, by digest."""

    def __init__(self, file: Path) -> None:
        """Read the file; raise ConfigError."""
        self._file = file
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    def reload(self) -> None:
        """Read the file again; raise ConfigError and keep the keys where it is broken."""
        self._digests = tuple(digest(key) for key in read_keys(self._file))

    def know(self, headers: Headers) -> bool:
        """Return whether one of the keys is in *headers*."""
        return any(is_one_of(key, self._digests) for key in keys_in(headers))


class Access:
    """What a connection has to pass: the certificate that it is shown, and the keys."""

    def __init__(
        self,
        keys: NodeKeys | None = None,
        certificate: Certificate | None = None,
        unguarded: OpenDaemon | None = None,
    ) -> None:
        self.unguarded = unguarded
        """What web pages find; None where a key is needed."""
        self._keys = keys
        self._certificate = certificate

    @classmethod
    def of(cls, config: NeuronConfig) -> Self:
        """Read the files that *config* names; raise ConfigError, which names the option too."""
        auth, tls = config.auth, config.tls
        keys = certificate = None
        if auth.key_file:
            with _option("auth.key_file"):
                keys = NodeKeys(Path(auth.key_file))
        if tls.certificate_file and tls.key_file:
            with _option("tls"):
                certificate = Certificate(Path(tls.certificate_file), Path(tls.key_file))
        return cls(keys, certificate, None if keys else as_open(config))

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._keys is None

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """What connections are made with; None without TLS."""
        return self._certificate.context if self._certificate else None

    def admits(self, headers: Headers) -> bool:
        """Return whether a request with *headers* may come in."""
        return self._keys is None or self._keys.know(headers)

    def reload(self) -> None:
        """Read every file again; blocks."""
        parts = {"auth.key_file": self._keys, "tls": self._certificate}
        for option, part in parts.items():
            if part is None:
                continue
            try:
                part.reload()
            except ConfigError as exc:
                log.warning("not reloaded, what it was stays", option=option, why=str(exc))
            else:
                log.info("reloaded", option=option)

    async def reload_at(self, hangup: asyncio.Event) -> None:
        """Reload whenever *hangup* is set, for ever."""
        while True:
            await hangup.wait()
            hangup.clear()
            await asyncio.to_thread(self.reload)


def as_open(config: NeuronConfig) -> OpenDaemon:
    """Return what web pages find where there is no key file."""
    return OpenDaemon(
        config.is_loopback,
        config.allowed_hosts,
        changing=("/models/", "/devices/"),
        remedy="set key_file in [auth]",
    )


def admitting(access: Access) -> Middleware:
    """Return the middleware that lets in nobody but whom *access* admits."""

    @web.middleware
    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        if access.unguarded:
            check_not_foreign(asked_by(request), access.unguarded)
        if not access.admits(request.headers):
            log.info("request without a valid key", path=request.path, remote=request.remote)
            raise InvalidApiKey("a key of this node is needed: Authorization: Bearer, or x-api-key")
        caller = request.headers.get(HEADER_KEY, "")
        if _FIT.fullmatch(caller):
            request[CALLER] = caller
        return await handler(request)

    return admit


def priority_of(headers: Headers) -> int:
    """Return what ``x-cortex-priority`` says, of a request that was let in; higher goes first.

    Raise InvalidRequest for what is no whole number in range.
    """
    said = headers.getall(HEADER_PRIORITY, ("0",))
    if len(said) == 1 and _WHOLE_NUMBER.fullmatch(said[0]):
        priority = int(said[0])
        if abs(priority) <= MOST_URGENT:
            return priority
    raise InvalidRequest(
        f"{HEADER_PRIORITY} is one whole number from -{MOST_URGENT} to {MOST_URGENT}, higher first",
        param=HEADER_PRIORITY,
    )


@contextlib.contextmanager
def _option(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
