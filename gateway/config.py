"""``cortex.toml``: every option of the gateway, with its default and its unit.

Environment variables override the file: ``CORTEX_GATEWAY__LISTEN`` is ``listen`` in ``[gateway]``,
``CORTEX_NEURONS__0__NAME`` the name of the first of ``[[neurons]]``. This is the only module of the
gateway that reads the environment. What is wrong is said in one sentence, before a socket opens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from cortex.ipc.keys import AbsolutePath
from cortex.ipc.node_api import GATEWAY_PORT, METRICS_PORT
from cortex.ipc.settings import Address, ConfigError, Origin, Settings, Table

DEFAULT_PATH = Path("/etc/cortex/cortex.toml")
PREFIX = "CORTEX_"
API_KEY_VARIABLE = "CORTEX_API_KEY"
"""The key that ``cortex status`` and ``cortex chat`` send; theirs, not an option of the gateway."""

NOT_OPTIONS = frozenset({API_KEY_VARIABLE, "CORTEX_VENV"})
"""Of the command line's and of scripts/install, which may run in the same environment."""

Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z",
        description="a name: letters, digits, dots, dashes and underscores",
    ),
]
ENDPOINT = r"^https?://[^/\s?#]+/?\Z"
Endpoint = Annotated[
    str,
    Meta(pattern=ENDPOINT, description="http://HOST:PORT or https://HOST:PORT, without a path"),
]
Seconds = Annotated[float, Meta(gt=0)]

NOT_YET = frozenset({"eviction", "engines"})
"""Options of the design whose logic is not there yet: refused, so that nobody relies on them."""


class Listening(Table, frozen=True):
    """``[gateway]``: where we listen, as HOST:PORT."""

    listen: Address = f"127.0.0.1:{GATEWAY_PORT}"
    metrics_listen: Address = f"127.0.0.1:{METRICS_PORT}"


class Neuron(Table, frozen=True):
    """One of ``[[neurons]]``: a node of the fleet."""

    name: Name
    endpoint: Endpoint
    key_file: AbsolutePath | None = None
    """Its first key goes along with every request to the node."""
    ca_file: AbsolutePath | None = None
    """PEM: the authorities that an https node's certificate may come from, and no others."""

    @property
    def url(self) -> str:
        """Base URL without a trailing slash."""
        return self.endpoint.rstrip("/")

    @property
    def host(self) -> str:
        """Name or address of the node, without brackets."""
        return urlsplit(self.endpoint).hostname or ""

    @property
    def is_encrypted(self) -> bool:
        """Whether the node is spoken to over TLS."""
        return self.endpoint.startswith("https:")


class Anthropic(Table, frozen=True):
    """``[anthropic]``: whether Claude Code's billing line, new in each conversation, goes."""

    strip_billing_block: bool = True


class Key(Table, frozen=True):
    """One of ``[[entitlements.keys]]``; without ``models`` it may use all of them."""

    key: Annotated[str, Meta(min_length=8)]
    id: Name
    models: list[str] | None = None


class Entitlements(Table, frozen=True):
    """``[entitlements]``: who may come in."""

    require_auth: bool = False
    keys: tuple[Key, ...] = ()


class Timeouts(Table, frozen=True):
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


class GatewayConfig(Table, frozen=True):
    """The whole file. ``models_config`` is relative to it; unset, ``models.toml`` beside it."""

    gateway: Listening = Listening()
    neurons: tuple[Neuron, ...] = ()
    models_config: str | None = None
    anthropic: Anthropic = Anthropic()
    entitlements: Entitlements = Entitlements()
    timeouts: Timeouts = Timeouts()


SETTINGS = Settings(GatewayConfig, PREFIX, not_options=NOT_OPTIONS, not_yet=NOT_YET)


def load_config(
    path: Path | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[GatewayConfig, Path | None]:
    """Return the configuration, and the file that ``models.toml`` is relative to.

    Without *path* the default file is read if it is there. Raise ConfigError.
    """
    config, origin = SETTINGS.read(path, DEFAULT_PATH, environment)
    _refuse_what_types_cannot(config, origin)
    return config, origin.file.path if origin.file else None


def _refuse_what_types_cannot(config: GatewayConfig, origin: Origin) -> None:
    """Raise ConfigError for values that are of the right type and do not go together."""
    if not config.neurons:
        needs = "at least one [[neurons]] with name and endpoint"
        raise ConfigError(
            f"no neuron is configured: {origin.file.path} needs {needs}"
            if origin.file
            else f"no neuron is configured: {DEFAULT_PATH} does not exist; write it, with {needs}, "
            "or name another file with --config (`cortex up` needs no file: it runs a gateway and "
            "a neuron on this machine)"
        )
    origin.refuse_twice(("neurons",), "name", [neuron.name for neuron in config.neurons])
    origin.refuse_twice(("neurons",), "endpoint", [neuron.url for neuron in config.neurons])
    for index, neuron in enumerate(config.neurons):
        if neuron.ca_file and not neuron.is_encrypted:
            raise origin.wrong(
                ("neurons", index, "ca_file"), "it has no meaning for an endpoint that is not https"
            )
    keys = config.entitlements.keys
    origin.refuse_twice(("entitlements", "keys"), "id", [key.id for key in keys])
    origin.refuse_twice(("entitlements", "keys"), "key", [key.key for key in keys], is_secret=True)
    if config.entitlements.require_auth and not keys:
        raise origin.wrong(
            ("entitlements", "require_auth"), "there must be at least one key to let in"
        )
