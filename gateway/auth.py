"""Who a request comes from.

A key comes as ``Authorization: Bearer`` or ``x-api-key``. Where keys are optional, a missing or
unknown one is nobody's: clients send placeholders, and web pages of elsewhere are kept out
(``ipc/web_pages.py``). Where they are required it is a 401.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Budget, Key, Listening
from cortex.gateway.written import Written
from cortex.ipc.errors import InvalidApiKey, ModelNotAllowed
from cortex.ipc.keys import digest, keys_in
from cortex.ipc.settings import is_loopback, split_address
from cortex.ipc.web_pages import OpenDaemon, asked_by, check_not_foreign

PUBLIC = frozenset(
    {
        ("GET", "/"),
        ("HEAD", "/"),
        ("HEAD", "/api/hello"),
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/openapi.json"),
        ("HEAD", "/openapi.json"),
    }
)

log = structlog.get_logger()


@dataclass(frozen=True)
class Principal:
    """Somebody: a key's id, what it may use (None: all) and how much. Nobody has no id."""

    key_id: str | None = None
    models: frozenset[str] | None = None
    is_operator: bool = False
    priority: int = 0
    """Those of a higher one go first, where a node is full."""
    budget: Budget | None = None
    max_in_flight: int | None = None

    def may_use(self, model: str, catalogue: Catalogue) -> bool:
        """Whether the model with this resolved id is allowed; keys may be written with aliases."""
        return self.models is None or model in {
            catalogue.target(allowed).id for allowed in self.models
        }

    def check_may_use(self, model: str, catalogue: Catalogue) -> None:
        """Raise ModelNotAllowed unless it may."""
        if not self.may_use(model, catalogue):
            raise ModelNotAllowed(f"the key {self.key_id!r} may not use {model!r}", param="model")


NOBODY = Principal()
_KEY = web.RequestKey("principal", Principal)


class Keys:
    """The keys of the configuration, by digest, so that a look-up tells nothing by its time."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._principals = {digest(key.key): _principal(key) for key in keys}

    def principal(self, keys: Iterable[str]) -> Principal | None:
        """Return whose the first of *keys* is that is anybody's, or None."""
        found = (self._principals.get(digest(key)) for key in keys)
        return next(filter(None, found), None)


def _principal(key: Key) -> Principal:
    models = None if key.models is None else frozenset(key.models)
    return Principal(key.id, models, key.operator, key.priority, key.budget, key.max_in_flight)


def principal_of(request: web.Request) -> Principal:
    """Return who ``authenticating`` found."""
    return request[_KEY]


def as_open(listening: Listening) -> OpenDaemon:
    """Return what web pages find where no key is required."""
    return OpenDaemon(
        is_loopback(split_address(listening.listen)[0]),
        listening.allowed_hosts,
        changing=("/fleet/",),
        remedy="set require_auth and a key in [entitlements]",
    )


def authenticating(written: Written) -> Middleware:
    """Return the middleware that finds out who it is, and where keys are due lets no others in."""
    entitlements = written.config.entitlements
    keys = Keys(entitlements.keys)
    unguarded = as_open(written.config.gateway)

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal entitlements, keys
        if entitlements is not written.config.entitlements:
            entitlements = written.config.entitlements
            keys = Keys(entitlements.keys)
        if not entitlements.require_auth:
            check_not_foreign(asked_by(request), unguarded)
        principal = keys.principal(keys_in(request.headers))
        is_public = (request.method, request.path) in PUBLIC
        if principal is None and entitlements.require_auth and not is_public:
            log.info("request without a valid key", path=request.path)
            raise InvalidApiKey("a valid key is needed: Authorization: Bearer, or x-api-key")
        request[_KEY] = principal or NOBODY
        return await handler(request)

    return authenticate
