"""Which web pages may speak to a daemon that asks for no key: those of this machine, and no others.

A browser is on this machine, and whatever page it shows may send requests to a daemon here. Two
headers, which no page can forge, tell where it is from:

    what a page does                                        what tells    where it is checked
    DNS rebinding: its own name comes to mean 127.0.0.1,    ``Host``      on a loopback address,
    so that it may read the answers too                                   with every method
    a request across sites: what needs no leave of ours,    ``Origin``    everywhere, but not with
    text/plain or a form; it acts and cannot read                         methods that only look

What is no browser sends no ``Origin``. A desktop app has one of a scheme of its own. ``null`` is a
page in a sandbox or in a file: it may ask models, and change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from cortex.ipc.errors import ForeignPage
from cortex.ipc.settings import is_loopback

LOOKING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
WEB: Final = frozenset({"http", "https"})
APPS: Final = frozenset({"app", "capacitor", "file", "tauri", "vscode-file", "vscode-webview"})
"""Schemes whose pages came with an app that somebody installed."""

_PLACE = re.compile(r"(?:\[(?P<ipv6>[^\]]+)\]|(?P<name>[^\s\[\]:/?#@]+))(?::[0-9]*)?")


@dataclass(frozen=True, slots=True)
class Asked:
    """The part of a request that tells where it is from."""

    method: str
    path: str
    host: str | None
    origin: str | None


@dataclass(frozen=True, slots=True)
class OpenDaemon:
    """A daemon that asks for no key."""

    listens_on_loopback: bool
    allowed_hosts: Sequence[str]
    """Names that a reverse proxy passes on."""
    changing: tuple[str, ...]
    """How the paths begin that are an operator's."""
    remedy: str
    """How a key is made necessary, in words."""


def asked_by(request: web.BaseRequest) -> Asked:
    """Return what of *request* tells where it is from."""
    headers = request.headers
    return Asked(request.method, request.path, headers.get("Host"), headers.get("Origin"))


def check_not_foreign(asked: Asked, daemon: OpenDaemon) -> None:
    """Raise ForeignPage for what only a web page of somewhere else would send."""
    if daemon.listens_on_loopback and asked.host is not None and not _is_ours(asked.host, daemon):
        raise ForeignPage(
            f"{asked.host!r} is no name of this machine; where it is a reverse proxy's, put it "
            f"into allowed_hosts, or {daemon.remedy}"
        )
    if asked.origin is None or asked.method in LOOKING or _may_act(asked.origin, asked, daemon):
        return
    raise ForeignPage(
        f"web pages of {asked.origin!r} may not do this without a key: {daemon.remedy}, or put "
        "the name of their host into allowed_hosts"
    )


def _may_act(origin: str, asked: Asked, daemon: OpenDaemon) -> bool:
    if origin == "null":
        return not asked.path.startswith(daemon.changing)
    scheme, _, place = origin.lower().partition("://")
    if scheme in APPS:
        return True
    is_same = asked.host is not None and place == asked.host.lower()
    return scheme in WEB and (is_same or _is_ours(place, daemon))


def _is_ours(place: str, daemon: OpenDaemon) -> bool:
    """Return whether *place*, HOST or HOST:PORT, is on this machine or one of those allowed."""
    found = _PLACE.fullmatch(place.lower())
    if found is None:
        return False
    host = found["ipv6"] or found["name"].removesuffix(".")
    is_allowed = host in (name.lower().removesuffix(".") for name in daemon.allowed_hosts)
    return is_allowed or host.endswith(".localhost") or is_loopback(host)
