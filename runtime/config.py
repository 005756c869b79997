"""The neuron's configuration: one TOML file, overridden by the environment; errors in words.

    NeuronConfig      listen, devices, models, cache, admission, taps, drain_seconds, log_level
    DeviceSpec        one device as it will run: its memory budget in bytes, its threads

``NEURON_`` and the path of an option, joined by ``__``, override the file: ``NEURON_LISTEN``,
``NEURON_ADMISSION__MAX_IN_FLIGHT``, ``NEURON_DEVICES=cpu:0,cpu:1``. This is the only module of the
neuron that reads the environment. What is wrong stops the start with its place and line.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import NEURON_PORT, LoadRequest
from cortex.runtime.sampling import operator_sampling
from cortex.runtime.sources import default_cache

DEFAULT_PATH = Path("/etc/neuron/neuron.toml")
SERVICE_DIRECTORY = Path("/run/neuron")
PREFIX = "NEURON_"
VALIDATION_SCRIPT = frozenset({"NEURON_PORT", "NEURON_LOAD_TIMEOUT", "NEURON_INFER_TIMEOUT"})
"""Read by scripts/validate-neuron.sh, which may run in the same environment; not options."""

DeviceName = Annotated[str, Meta(pattern=r"^(cpu|cuda):(0|[1-9]\d*)$")]


class ConfigError(ValueError):
    """The configuration cannot be used; the text says where and why."""


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[devices]]``: one device to run, and what it may take."""

    name: DeviceName
    """``cuda:N`` as CUDA numbers them by PCI bus, or ``cpu:N``."""
    memory_mb: Annotated[int, Meta(ge=64)] | None = None
    """Budget; by default all of a GPU, or an equal share of the host's available memory."""
    threads: Annotated[int, Meta(ge=1)] | None = None
    """Of a CPU device; by default an equal share of the cores."""


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[cache]``: where fetched models lie."""

    directory: str = ""
    """Empty: ``cortex/models`` in the user's cache directory."""


class AdmissionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[admission]``: how many requests a model takes, for each model."""

    max_in_flight: Annotated[int, Meta(ge=1)] = 32
    """Requests that generate at the same time."""
    max_queue_depth: Annotated[int, Meta(ge=0)] = 64
    """Requests that wait for a seat; one more is answered 503 ``overloaded``."""
    max_wait_seconds: Annotated[float, Meta(gt=0)] = 30.0
    """How long a request waits for a seat before it is answered 503 ``overloaded``."""


class TapsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[taps]``: the debug sockets that ``neuron tap`` reads."""

    enabled: bool = True
    directory: str = ""
    """Empty: ``taps-PORT`` in /run/neuron, else in the user's runtime or cache directory."""


class NeuronConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be set; the defaults serve."""

    listen: str = f"127.0.0.1:{NEURON_PORT}"
    devices: Literal["auto"] | list[DeviceConfig] = "auto"
    """``auto``: every GPU, or ``cpu:0`` where there is none."""
    models: list[LoadRequest] = []
    """Loaded one after the other at the start, while the neuron already answers."""
    cache: CacheConfig = CacheConfig()
    admission: AdmissionConfig = AdmissionConfig()
    taps: TapsConfig = TapsConfig()
    drain_seconds: Annotated[float, Meta(ge=0)] = 60.0
    """How long running requests may take to finish after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return parse_address(self.listen)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the neuron."""
        host = self.address[0]
        return host in {"localhost", "::1"} or host.startswith("127.")

    @property
    def cache_directory(self) -> Path:
        """Where fetched models lie."""
        if self.cache.directory:
            return Path(self.cache.directory).expanduser()
        return default_cache(os.environ)

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


def load_config(
    path: Path | None, environment: Mapping[str, str] | None = None, **overrides: Any
) -> NeuronConfig:
    """Return the configuration in *path*, else in the default place, else the defaults.

    *overrides* (of the command line; None is absent) win over *environment*, which wins over the
    file. Raise ConfigError in words.
    """
    environment = os.environ if environment is None else environment
    raw, text, source = _read(path)
    _convert(raw, text, source)
    for name, value in environment.items():
        if name.startswith(PREFIX) and name not in VALIDATION_SCRIPT:
            _override(raw, name, value)
    raw.update({name: value for name, value in overrides.items() if value is not None})
    config = _convert(raw, "", source if not overrides else "the command line")
    _refuse_what_types_cannot(config)
    return config


def cuda_visible_devices(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the GPUs that the environment restricts CUDA to, or None for all."""
    environment = os.environ if environment is None else environment
    return environment.get("CUDA_VISIBLE_DEVICES")


def parse_address(listen: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[HOST]:PORT``; raise ConfigError."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]\s]+)):(\d{1,5})", listen)
    if found is None or int(found[3]) > 65535:
        raise ConfigError(f"listen = {listen!r} is not HOST:PORT, such as 127.0.0.1:{NEURON_PORT}")
    return found[1] or found[2], int(found[3])


def parse_devices(names: str) -> str | list[dict[str, str]]:
    """Return what ``devices`` takes for ``auto`` or ``cpu:0,cpu:1``."""
    if names.strip() == "auto":
        return "auto"
    return [{"name": name.strip()} for name in names.split(",")]


def _runtime_directory() -> Path:
    """Return a directory for sockets that only this user can open."""
    if os.access(SERVICE_DIRECTORY, os.W_OK):
        return SERVICE_DIRECTORY
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "neuron"
    return default_cache(os.environ).parent / "neuron"


def _read(path: Path | None) -> tuple[dict[str, Any], str, str]:
    """Return the file's tables, its text, and how to call it."""
    if path is None and not DEFAULT_PATH.exists():
        return {}, "", "the defaults"
    path = path or DEFAULT_PATH
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text, str(path)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:  # bytes that are no text, or text that is no TOML
        raise ConfigError(f"{path} is not TOML: {exc}") from exc


def _convert(raw: dict[str, Any], text: str, source: str) -> NeuronConfig:
    try:
        return msgspec.convert(raw, NeuronConfig)
    except msgspec.ValidationError as exc:
        message, _, place = str(exc).partition(" - at `$")
        unknown = re.search(r"unknown field `(.*)`", message)
        keys = _keys(place.rstrip("`")) + ([unknown[1]] if unknown else [])
        if unknown:
            message = "there is no such option"
        line = _line_of(text, keys)
        where = f"{source}, line {line}" if line else source
        raise ConfigError(f"{where}: {_dotted(keys)}: {message}") from exc


def _keys(path: str) -> list[str | int]:
    """``.models[0].quant`` -> ``["models", 0, "quant"]``."""
    found = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path)
    return [name or int(index) for name, index in found]


def _dotted(keys: list[str | int]) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")


def _line_of(text: str, keys: list[str | int]) -> int | None:
    """Return the line that sets *keys*, or None where a look at the lines does not find it."""
    table: list[str | int] = []
    counts: dict[str, int] = {}
    best = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([\w.\"-]+)\s*\]", line):
            name = header[2]
            table = [part.strip('"') for part in name.split(".")]
            if header[1] == "[[":
                counts[name] = counts.get(name, -1) + 1
                table.append(counts[name])
            at = table
        elif key := re.match(r"\s*([\w.\"-]+)\s*=", line):
            at = [*table, *(part.strip('"') for part in key[1].split("."))]
        else:
            continue
        if keys[: len(at)] == at or (best is None and at[: len(keys)] == keys):
            best = number
    return best


def _override(raw: dict[str, Any], variable: str, value: str) -> None:
    """Put an environment variable where the file would have it; raise ConfigError."""
    keys = variable.removeprefix(PREFIX).lower().split("__")
    kind: Any = NeuronConfig
    for key in keys:
        fields = msgspec.structs.fields(kind) if _is_struct(kind) else ()
        kind = next((field.type for field in fields if field.name == key), None)
        if kind is None:
            raise ConfigError(f"{variable} in the environment: there is no such option")
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
    raw[keys[-1]] = _from_text(variable, keys, kind, value)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _from_text(variable: str, keys: list[str], kind: Any, text: str) -> Any:
    if _is_struct(kind):
        raise ConfigError(f"{variable} in the environment is a section: add __ and an option")
    value: Any = text
    if keys == ["devices"]:
        value = parse_devices(text)
    elif keys == ["models"]:
        value = [{"model_id": model.strip()} for model in text.split(",") if model.strip()]
    try:
        return msgspec.to_builtins(msgspec.convert(value, kind, strict=False))
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{variable}={text!r} in the environment: {exc}") from exc


def _refuse_what_types_cannot(config: NeuronConfig) -> None:
    """Raise ConfigError for values that are of the right type and still cannot be meant."""
    parse_address(config.listen)
    if config.devices != "auto":
        _refuse_twice("devices", [device.name for device in config.devices])
        if not config.devices:
            raise ConfigError('devices is empty: name one, or leave it at "auto"')
    _refuse_twice("models", [model.model_id for model in config.models])
    for model in config.models:
        _refuse_model(model)
    if not config.cache.directory:
        _refuse_homeless()


def _refuse_model(model: LoadRequest) -> None:
    if model.wait:
        raise ConfigError(f"models: {model.model_id}: wait has no meaning here; leave it out")
    try:
        operator_sampling(model)
    except ApiError as exc:
        raise ConfigError(f"models: {model.model_id}: {exc}") from exc


def _refuse_twice(option: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{option} names {name!r} twice")


def _refuse_homeless() -> None:
    try:
        default_cache(os.environ)
    except RuntimeError as exc:
        raise ConfigError("there is no home directory: set directory in [cache]") from exc
