"""The neuron's configuration: one TOML file, overridden by the environment; errors in words.

    NeuronConfig      listen, allowed_hosts, devices, models, cache, sources, admission, engine,
                      taps, auth, tls, drain_seconds, log_level
    DeviceSpec        one device as it will run: its memory budget in bytes, its threads

``NEURON_`` and the path of an option, joined by ``__``, override the file: ``NEURON_LISTEN``,
``NEURON_ADMISSION__MAX_IN_FLIGHT``, ``NEURON_DEVICES=cpu:0,cpu:1``. This is the only module of the
neuron that reads the environment. What is wrong stops the start with its place and line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.ipc import injection
from cortex.ipc.engine_options import Attention, EngineOptions
from cortex.ipc.keys import AbsolutePath
from cortex.ipc.node_api import NEURON_PORT, LoadRequest
from cortex.ipc.settings import (
    Address,
    ConfigError,
    HostName,
    Origin,
    Settings,
    Table,
    is_loopback,
    split_address,
)
from cortex.runtime.places import Places, SourcesConfig, places_of
from cortex.runtime.sources import default_cache

DEFAULT_PATH = Path("/etc/neuron/neuron.toml")
SERVICE_DIRECTORY = Path("/run/neuron")
PREFIX = "NEURON_"
VALIDATION_SCRIPT = frozenset({"NEURON_PORT", "NEURON_LOAD_TIMEOUT", "NEURON_INFER_TIMEOUT"})
"""Read by scripts/validate-neuron.sh, which may run in the same environment; not options."""

TEST_FAULTS = "NEURON_TEST_FAULTS"
"""For tests, and no option: what shall go wrong; see ``cortex.ipc.injection``."""

DeviceName = Annotated[
    str, Meta(pattern=r"^(cpu|cuda):(0|[1-9]\d*)\Z", description="cpu:N or cuda:N")
]


class DeviceConfig(Table, frozen=True):
    """``[[devices]]``: one device to run, and what it may take."""

    name: DeviceName
    """``cuda:N`` as CUDA numbers them by PCI bus, or ``cpu:N``."""
    memory_mb: Annotated[int, Meta(ge=64)] | None = None
    """Budget; by default all of a GPU, or an equal share of the host's available memory."""
    threads: Annotated[int, Meta(ge=1)] | None = None
    """Of a CPU device; by default an equal share of the cores."""


Directory = Annotated[str, Meta(pattern=r"^[^\0]*\Z", description="a path")]


class CacheConfig(Table, frozen=True):
    """``[cache]``: where fetched models lie."""

    directory: Directory = ""
    """Empty: ``cortex/models`` in the user's cache directory."""


class AdmissionConfig(Table, frozen=True):
    """``[admission]``: how many requests a model takes, for each model."""

    max_in_flight: Annotated[int, Meta(ge=1)] = 32
    """Answers that are made at the same time; never more than the model's ``max_sequences``."""
    max_queue_depth: Annotated[int, Meta(ge=0)] = 64
    """Requests that wait for a seat; one more is answered 503 ``overloaded``."""
    max_wait_seconds: Annotated[float, Meta(gt=0)] = 30.0
    """How long a request waits for a seat before it is answered 503 ``overloaded``."""


class EngineConfig(Table, frozen=True):
    """``[engine]``: how models compute, and when a device process counts as hanging.

    One that hangs is killed and begins anew.
    """

    prefix_cache: bool = True
    """A prompt that begins like an earlier one is computed from where they part."""
    speculation: bool = True
    """Tokens that the text itself suggests are computed ahead; the answers are the same."""
    batch_invariant: bool = False
    """On a GPU no answer depends on what else is computed with it, at a price in speed. On a CPU
    that is always so."""
    attention: Attention = "auto"
    """On a GPU: the first that is there of flash_attn, torch's own and triton, or the one named;
    ``reference`` is plain torch, slow."""
    cuda_graphs: bool = True
    """On a GPU: a step in which every sequence brings one token is launched as one graph."""
    step_deadline_seconds: Annotated[float, Meta(gt=0)] = 60.0
    """The longest that one step may take."""
    load_stall_seconds: Annotated[float, Meta(gt=0)] = 300.0
    """The longest that a load may make no progress."""

    @property
    def options(self) -> EngineOptions:
        """The part that the device processes are told."""
        return EngineOptions(
            **{name: getattr(self, name) for name in EngineOptions.__struct_fields__}
        )


class TapsConfig(Table, frozen=True):
    """``[taps]``: the debug sockets that ``neuron tap`` reads."""

    enabled: bool = True
    directory: Directory = ""
    """Empty: ``taps-PORT`` in /run/neuron, else in the user's runtime or cache directory."""


class AuthConfig(Table, frozen=True):
    """``[auth]``: who may use the node."""

    key_file: AbsolutePath | None = None
    """One key per line, one of which every request needs; unset, whoever reaches the node may."""


class TlsConfig(Table, frozen=True):
    """``[tls]``: both or none; TLS 1.2 and later."""

    certificate_file: AbsolutePath | None = None
    """PEM: the node's certificate, then those that lead to its authority."""
    key_file: AbsolutePath | None = None
    """PEM: the private key of the certificate, without a password."""


class NeuronConfig(Table, frozen=True):
    """Everything that can be set; the defaults serve."""

    listen: Address = f"127.0.0.1:{NEURON_PORT}"
    allowed_hosts: tuple[HostName, ...] = ()
    """Names of this node besides localhost, and of hosts whose web pages may use it."""
    devices: Literal["auto"] | list[DeviceConfig] = "auto"
    """``auto``: every GPU, or ``cpu:0`` where there is none."""
    models: list[LoadRequest] = msgspec.field(default_factory=list)
    """Loaded one after the other at the start, while the neuron already answers."""
    cache: CacheConfig = CacheConfig()
    sources: SourcesConfig = SourcesConfig()
    admission: AdmissionConfig = AdmissionConfig()
    engine: EngineConfig = EngineConfig()
    taps: TapsConfig = TapsConfig()
    auth: AuthConfig = AuthConfig()
    tls: TlsConfig = TlsConfig()
    drain_seconds: Annotated[float, Meta(ge=0)] = 60.0
    """How long running requests may take to finish after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return split_address(self.listen)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the neuron."""
        return is_loopback(self.address[0])

    @property
    def cache_directory(self) -> Path:
        """Where fetched models lie."""
        if self.cache.directory:
            return Path(self.cache.directory).expanduser()
        return default_cache(os.environ)

    @property
    def places(self) -> Places:
        """Where models may come from, and where what was fetched lies; raise ConfigError."""
        return places_of(
            self.sources, os.environ, cache=self.cache_directory, is_loopback=self.is_loopback
        )

    def tap_directory(self, port: int) -> Path:
        """Return where the processes of the neuron that listens on *port* bind their taps."""
        if self.taps.directory:
            return Path(self.taps.directory).expanduser()
        return _runtime_directory() / f"taps-{port}"


class DeviceSpec(msgspec.Struct, frozen=True):
    """One device as it will run; ``threads`` is None on a GPU."""

    index: int
    name: str
    memory_bytes: int
    threads: int | None = None

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.name.partition(":")[0]


def parse_devices(names: str) -> str | list[dict[str, str]]:
    """Return what ``devices`` takes for ``auto`` or ``cpu:0,cpu:1``."""
    if names.strip() == "auto":
        return "auto"
    return [{"name": name.strip()} for name in names.split(",")]


def parse_models(ids: str) -> list[dict[str, str]]:
    """Return what ``models`` takes for ``a,b``."""
    return [{"model_id": model_id.strip()} for model_id in ids.split(",") if model_id.strip()]


def parse_roots(paths: str) -> list[str]:
    """Return what ``roots`` takes for ``/a,/b``."""
    return [path.strip() for path in paths.split(",") if path.strip()]


SETTINGS = Settings(
    NeuronConfig,
    PREFIX,
    not_options=VALIDATION_SCRIPT | {TEST_FAULTS},
    spellings={
        "devices": parse_devices,
        "models": parse_models,
        "sources.file.roots": parse_roots,
    },
)


def load_config(
    path: Path | None, environment: Mapping[str, str] = os.environ, **overrides: Any
) -> NeuronConfig:
    """Return the configuration in *path*, else in the default place, else the defaults.

    *overrides* are the command line's; None is absent. Raise ConfigError.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    config, origin = SETTINGS.read(path, DEFAULT_PATH, environment, given)
    _refuse_what_types_cannot(config, origin)
    return config


def ordered_faults(environment: Mapping[str, str] = os.environ) -> str:
    """Return the faults that a test ordered, normally none; raise ConfigError."""
    text = environment.get(TEST_FAULTS, "")
    try:
        injection.parse(text)
    except ValueError as exc:
        raise ConfigError(f"{TEST_FAULTS}: {exc}") from exc
    return text


def cuda_visible_devices(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the GPUs that the environment restricts CUDA to, or None for all."""
    return environment.get("CUDA_VISIBLE_DEVICES")


def _runtime_directory() -> Path:
    """Return a directory for sockets that only this user can open."""
    if os.access(SERVICE_DIRECTORY, os.W_OK):
        return SERVICE_DIRECTORY
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "neuron"
    return default_cache(os.environ).parent / "neuron"


def _refuse_what_types_cannot(config: NeuronConfig, origin: Origin) -> None:
    """Raise ConfigError for values that are of the right type and still cannot be meant."""
    if config.devices != "auto":
        origin.refuse_twice(("devices",), "name", [device.name for device in config.devices])
        if not config.devices:
            raise origin.wrong(("devices",), 'it is empty: name one, or leave it at "auto"')
    origin.refuse_twice(("models",), "model_id", [model.model_id for model in config.models])
    for index, model in enumerate(config.models):
        if model.wait:
            raise origin.wrong(("models", index, "wait"), "it has no meaning here; leave it out")
    if (config.tls.certificate_file is None) != (config.tls.key_file is None):
        raise origin.wrong(("tls",), "it needs both certificate_file and key_file, or neither")
    for table, directory in (("cache", config.cache.directory), ("taps", config.taps.directory)):
        try:
            Path(directory).expanduser()
        except RuntimeError as exc:
            raise origin.wrong((table, "directory"), "nobody here has that home") from exc
    if not config.cache.directory:
        _refuse_homeless()


def _refuse_homeless() -> None:
    try:
        default_cache(os.environ)
    except RuntimeError as exc:
        raise ConfigError("there is no home directory: set directory in [cache]") from exc
