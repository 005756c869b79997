"""``cortex.toml``: every option of the gateway, with its default and its unit.

Environment variables override the file: ``CORTEX_GATEWAY__LISTEN`` is ``listen`` in ``[gateway]``,
``CORTEX_NEURONS__0__NAME`` the name of the first of ``[[neurons]]``. This is the only module that
reads the environment. What is wrong is said with its file, line and place, before a socket opens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cortex.gateway.toml_lines import line_of
from cortex.ipc.node_api import GATEWAY_PORT, METRICS_PORT

DEFAULT_PATH = Path("/etc/cortex/cortex.toml")
PREFIX = "CORTEX_"
API_KEY_VARIABLE = "CORTEX_API_KEY"
"""The key that ``cortex status`` and ``cortex chat`` send; theirs, not an option of the gateway."""

NOT_OPTIONS = frozenset({API_KEY_VARIABLE, "CORTEX_VENV"})
"""Of the command line's and of scripts/install, which may run in the same environment."""

T = TypeVar("T", bound=msgspec.Struct)
ADDRESS = r"^(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):\d{1,5}$"
Address = Annotated[str, Meta(pattern=ADDRESS)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Endpoint = Annotated[str, Meta(pattern=r"^https?://[^/\s?#]+/?$")]
Seconds = Annotated[float, Meta(gt=0)]

NOT_YET = frozenset({"eviction", "engines", "key_file", "ca_file"})
"""Options of the design whose logic is not there yet: refused, so that nobody relies on them."""

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]+)`")
_AT = re.compile(r"(?P<text>.*?)(?: - at `\$?\.?(?P<place>[^`]*)`)?$", re.DOTALL)


class ConfigError(Exception):
    """The configuration cannot be used; the text says where and why."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every table."""


class Listening(Part, frozen=True):
    """``[gateway]``: where we listen, as HOST:PORT."""

    listen: Address = f"127.0.0.1:{GATEWAY_PORT}"
    metrics_listen: Address = f"127.0.0.1:{METRICS_PORT}"


class Neuron(Part, frozen=True):
    """One of ``[[neurons]]``: a node of the fleet."""

    name: Name
    endpoint: Endpoint

    @property
    def url(self) -> str:
        """Base URL without a trailing slash."""
        return self.endpoint.rstrip("/")


class Anthropic(Part, frozen=True):
    """``[anthropic]``: whether Claude Code's billing line, new in each conversation, goes."""

    strip_billing_block: bool = True


class Key(Part, frozen=True):
    """One of ``[[entitlements.keys]]``; without ``models`` it may use all of them."""

    key: Annotated[str, Meta(min_length=8)]
    id: Name
    models: list[str] | None = None


class Entitlements(Part, frozen=True):
    """``[entitlements]``: who may come in."""

    require_auth: bool = False
    keys: tuple[Key, ...] = ()


class Timeouts(Part, frozen=True):
    """``[timeouts]``, all in seconds."""

    connect_seconds: Seconds = 2.0
    control_seconds: Seconds = 5.0
    load_seconds: Seconds = 1800.0
    between_bytes_seconds: Seconds = 300.0
    client_stalled_seconds: Seconds = 30.0
    drain_seconds: Seconds = 60.0
    poll_seconds: Seconds = 2.0
    poll_while_loading_seconds: Seconds = 0.5
    keep_alive_seconds: Seconds = 1.0


class GatewayConfig(Part, frozen=True):
    """The whole file. ``models_config`` is relative to it; unset, ``models.toml`` beside it."""

    gateway: Listening = Listening()
    neurons: tuple[Neuron, ...] = ()
    models_config: str | None = None
    anthropic: Anthropic = Anthropic()
    entitlements: Entitlements = Entitlements()
    timeouts: Timeouts = Timeouts()


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; an IPv6 host loses its brackets.

    Raise ConfigError.
    """
    if not re.match(ADDRESS, address):
        raise ConfigError(f"{address!r} is not an address; HOST:PORT is, or [IPV6]:PORT")
    host, _, port = address.rpartition(":")
    if int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address: ports end at 65535")
    return host.strip("[]"), int(port)


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of *path* and what it says; raise ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read {path}: {reason}") from exc
    try:
        raw: dict[str, Any] = msgspec.toml.decode(text)
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return text, raw


def in_words(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return the dotted place of *error* and what is wrong there."""
    parts = _AT.match(str(error))
    assert parts is not None
    place, text = parts["place"] or "", parts["text"]
    if unknown := _UNKNOWN.match(text):
        field = unknown["field"]
        place = f"{place}.{field}".strip(".")
        return place, "not supported by this version" if field in NOT_YET else "unknown option"
    return place, text[0].lower() + text[1:]


def typed(raw: dict[str, Any], shape: type[T], path: Path, text: str) -> T:
    """Return *raw*, read from *path* with *text*, as a *shape*; raise ConfigError."""
    try:
        return msgspec.convert(raw, shape)
    except msgspec.ValidationError as exc:
        place, wrong = in_words(exc)
        line = line_of(text, place)
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{where}: {place}: {wrong}") from exc


def load_config(
    path: Path | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[GatewayConfig, Path | None]:
    """Return the configuration, and the file that ``models.toml`` is relative to.

    Without *path* the default file is read if it is there. Raise ConfigError.
    """
    file = path or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    raw: dict[str, Any] = {}
    if file is not None:
        text, raw = read_toml(file)
        typed(raw, GatewayConfig, file, text)
    config = _overridden(raw, environ)
    _check(config, file or DEFAULT_PATH)
    return config, file


def _overridden(raw: dict[str, Any], environ: Mapping[str, str]) -> GatewayConfig:
    places: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in NOT_OPTIONS:
            continue
        steps = variable.removeprefix(PREFIX).lower().split("__")
        places[_dotted(steps)] = variable
        _set(raw, steps, environ[variable], variable)
    try:
        return msgspec.convert(raw, GatewayConfig, strict=False)
    except msgspec.ValidationError as exc:
        place, wrong = in_words(exc)
        variable = next((v for p, v in places.items() if p.startswith(place)), place)
        raise ConfigError(f"{variable}: {wrong}") from exc


def _dotted(steps: list[str]) -> str:
    return "".join(f"[{s}]" if s.isdigit() else f".{s}" for s in steps).strip(".")


def _set(raw: dict[str, Any], steps: list[str], value: str, variable: str) -> None:
    """Put *value* at *steps* of *raw*; a number is a place in a list, which may grow by one."""
    at: Any = raw
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        new: Any = value if following is None else [] if following.isdigit() else {}
        if isinstance(at, list) and step.isdigit() and int(step) <= len(at):
            if int(step) == len(at):
                at.append(new)
            elif following is None:
                at[int(step)] = new
            at = at[int(step)]
        elif isinstance(at, dict):
            at[step] = new if following is None else at.get(step, new)
            at = at[step]
        else:
            raise ConfigError(f"{variable}: there is no such place in the configuration")


def _check(config: GatewayConfig, file: Path) -> None:
    """Raise ConfigError for what types cannot say."""
    split_address(config.gateway.listen)
    split_address(config.gateway.metrics_listen)
    if not config.neurons:
        raise ConfigError(
            f"no neuron is configured: {file} needs at least one [[neurons]] with name and "
            "endpoint (`cortex up` runs a gateway and a neuron without any file)"
        )
    entitlements = config.entitlements
    for what, values in (
        ("neurons: name", [neuron.name for neuron in config.neurons]),
        ("neurons: endpoint", [neuron.url for neuron in config.neurons]),
        ("entitlements.keys: id", [key.id for key in entitlements.keys]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"{file}: {what} {twice[0]!r} is there twice")
    if len({key.key for key in entitlements.keys}) < len(entitlements.keys):
        raise ConfigError(f"{file}: entitlements.keys: two ids have the same key")
    if entitlements.require_auth and not entitlements.keys:
        raise ConfigError(f"{file}: entitlements.require_auth needs at least one key to let in")
