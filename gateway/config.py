"""``cortex.toml``: every option of the gateway, with its default and its unit.

Environment variables override the file: ``CORTEX_GATEWAY__LISTEN`` is ``listen`` in ``[gateway]``,
``CORTEX_NEURONS__0__NAME`` the name of the first of ``[[neurons]]``. What is wrong is said in one
sentence, before a socket opens.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import structlog
from msgspec import Meta

from cortex.ipc.keys import AbsolutePath
from cortex.ipc.node_api import GATEWAY_PORT, METRICS_PORT
from cortex.ipc.settings import Address, ConfigError, HostName, Origin, Settings, Table
from cortex.ipc.toml_lines import Keys

log = structlog.get_logger()

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
ENDPOINT = r"^https?://[^/\s?#@\\]+/?\Z"
Endpoint = Annotated[
    str,
    Meta(pattern=ENDPOINT, description="http://HOST:PORT or https://HOST:PORT, without a path"),
]
FilePath = Annotated[str, Meta(pattern=r"^[^\0]+\Z", description="the path of a file")]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
"""Timers of event loops take no infinity."""

KeyText = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]{8,}\Z",
        description="at least 8 printable ASCII characters without spaces",
    ),
]
"""As in a file of keys: anything else a header does not carry as it is written."""

Priority = Annotated[int, Meta(ge=-10, le=10)]
Count = Annotated[int, Meta(ge=1)]


class Listening(Table, frozen=True):
    """``[gateway]``: where we listen, as HOST:PORT, and under which names."""

    listen: Address = f"127.0.0.1:{GATEWAY_PORT}"
    metrics_listen: Address = f"127.0.0.1:{METRICS_PORT}"
    allowed_hosts: tuple[HostName, ...] = ()
    """Names of this gateway besides localhost, and of hosts whose web pages may use it."""


class Neuron(Table, frozen=True):
    """One of ``[[neurons]]``: a node of the fleet."""

    name: Name
    endpoint: Endpoint
    key_file: AbsolutePath | None = None
    """Its first key goes along with every request to the node."""
    ca_file: AbsolutePath | None = None
    """PEM: the authorities that an https node's certificate may come from, and no others."""

    kind: ClassVar[str] = "neuron"

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


class Engine(Neuron, frozen=True):
    """One of ``[[engines]]``: an OpenAI-compatible server that we do not manage.

    It is a node that is never asked to load or unload anything; its models are those it lists at
    ``/v1/models``, or those of them that are in ``models``.
    """

    models: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    max_in_flight: Count | None = None
    """Requests that we give it at the same time; None: as many as there are."""

    kind: ClassVar[str] = "engine"


class Eviction(Table, frozen=True):
    """``[eviction]``: which model goes when another one needs its memory."""

    strategy: Literal["lru", "priority"] = "lru"
    defrag_after_cycles: Annotated[int, Meta(ge=0)] = 50
    """Loads and unloads after which an idle device is restarted; 0: never."""
    min_dwell_seconds: Annotated[float, Meta(ge=0)] = 10.0
    """How long a model that has been loaded stays, whoever else wants its memory."""
    idle_unload_seconds: Annotated[float, Meta(ge=0)] = 0.0
    """After which a model that nobody uses goes, unless its profile says otherwise; 0: never."""


class Routing(Table, frozen=True):
    """``[routing]``: how far a session may stay where its prompts are cached, and broken nodes."""

    affinity_load_factor: Annotated[float, Meta(ge=1.0, le=1e9)] = 1.25
    """A session leaves its home where that has more than so many times the mean load."""
    breaker_failures: Count = 3
    """Failures in a row on the data path that close a node to new requests."""
    breaker_open_seconds: Seconds = 5.0
    """How long, before one request tries it again."""


class State(Table, frozen=True):
    """``[state]``: where pins, usage, responses and footprints are kept.

    Unset, systemd's ``$STATE_DIRECTORY``, else ``cortex`` in ``$XDG_STATE_HOME``.
    """

    directory: AbsolutePath | None = None


class Responses(Table, frozen=True):
    """``[responses]``: what ``previous_response_id`` may go back to."""

    max_stored: Annotated[int, Meta(ge=0)] = 1000
    max_stored_mb: Annotated[int, Meta(ge=0)] = 256


class Anthropic(Table, frozen=True):
    """``[anthropic]``: whether Claude Code's billing line, new in each conversation, goes."""

    strip_billing_block: bool = True


class Budget(Table, frozen=True):
    """``budget`` of a key: tokens, prompts and answers together.

    ``per_seconds`` says over which time; without it the tokens are a balance that is spent once.
    """

    tokens: Count
    per_seconds: Count | None = None


class Key(Table, frozen=True):
    """One of ``[[entitlements.keys]]``; without ``models`` it may use all of them."""

    key: KeyText
    id: Name
    models: list[str] | None = None
    budget: Budget | None = None
    max_in_flight: Count | None = None
    """Requests at the same time; one more is refused."""
    priority: Priority = 0
    """Those of a higher one go first, where a node is full."""
    operator: bool = False
    """May load, unload, pin and drain, where keys are required; else everybody may."""


class Entitlements(Table, frozen=True):
    """``[entitlements]``: who may come in."""

    require_auth: bool = False
    keys: tuple[Key, ...] = ()


class Timeouts(Table, frozen=True):
    """``[timeouts]``, all in seconds."""

    connect_seconds: Seconds = 2.0
    control_seconds: Seconds = 5.0
    load_seconds: Seconds = 1800.0
    load_wait_seconds: Seconds = 240.0
    """What a request that does not stream waits for a load, before it is told when to come back."""
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
    engines: tuple[Engine, ...] = ()
    models_config: FilePath | None = None
    anthropic: Anthropic = Anthropic()
    entitlements: Entitlements = Entitlements()
    eviction: Eviction = Eviction()
    routing: Routing = Routing()
    state: State = State()
    responses: Responses = Responses()
    timeouts: Timeouts = Timeouts()

    @property
    def nodes(self) -> tuple[Neuron, ...]:
        """The whole fleet: neurons, then engines."""
        return (*self.neurons, *self.engines)


SETTINGS = Settings(GatewayConfig, PREFIX, not_options=NOT_OPTIONS)


def load_config(
    path: Path | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[GatewayConfig, Path | None]:
    """Return the configuration, and the file that ``models.toml`` is relative to.

    Without *path* the default file is read if it is there. Raise ConfigError.
    """
    config, origin = SETTINGS.read(path, DEFAULT_PATH, environment)
    _refuse_what_types_cannot(config, origin)
    if origin.file and config.entitlements.keys:
        _warn_of_readers(origin.file.path)
    return config, origin.file.path if origin.file else None


def _warn_of_readers(path: Path) -> None:
    if path.stat().st_mode & stat.S_IROTH:
        log.warning("anybody on this host can read the keys", file=str(path), mend="chmod 640")


def _refuse_what_types_cannot(config: GatewayConfig, origin: Origin) -> None:
    """Raise ConfigError for values that are of the right type and do not go together."""
    if not config.nodes:
        raise ConfigError(f"no neuron is configured: {_what_is_needed(origin)}")
    _refuse_nodes(config, origin)
    keys = config.entitlements.keys
    origin.refuse_twice(("entitlements", "keys"), "id", [key.id for key in keys])
    origin.refuse_twice(("entitlements", "keys"), "key", [key.key for key in keys], is_secret=True)
    if config.entitlements.require_auth and not keys:
        raise origin.wrong(
            ("entitlements", "require_auth"), "there must be at least one key to let in"
        )


def _what_is_needed(origin: Origin) -> str:
    needs = "at least one [[neurons]] with name and endpoint"
    if origin.file:
        return f"{origin.file.path} needs {needs}"
    return (
        f"{DEFAULT_PATH} does not exist; write it, with {needs}, or name another file with "
        "--config (`cortex up` needs no file: it runs a gateway and a neuron on this machine)"
    )


def _refuse_nodes(config: GatewayConfig, origin: Origin) -> None:
    """Raise ConfigError for nodes, neurons or engines, that cannot be told apart or spoken to."""
    places: list[tuple[Keys, Neuron]] = [
        *((("neurons", index), neuron) for index, neuron in enumerate(config.neurons)),
        *((("engines", index), engine) for index, engine in enumerate(config.engines)),
    ]
    taken: set[str] = set()
    for keys, node in places:
        for option, value in (("name", node.name), ("endpoint", node.url)):
            if value in taken:
                raise origin.wrong((*keys, option), f"{value!r} is there twice")
            taken.add(value)  # no name looks like an endpoint
        if wrong := _no_address(node.url):
            raise origin.wrong((*keys, "endpoint"), wrong)
        if node.ca_file and not node.is_encrypted:
            raise origin.wrong(
                (*keys, "ca_file"), "it has no meaning for an endpoint that is not https"
            )


def _no_address(url: str) -> str | None:
    """Return why nobody could connect to *url*, or None."""
    try:
        parts = urlsplit(url)
        is_whole = parts.hostname and parts.port != 0
    except ValueError as exc:
        return str(exc)
    return None if is_whole else "it names no host, or port 0"
