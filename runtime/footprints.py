"""What models have been measured to hold, kept from one run of the neuron to the next.

    footprints.json    {"version": 2, "measured": [Measured, ...]}

A footprint is that of one device, the one that holds most of them. It goes by everything that
decides it: model, quant, dtype, kind and number of devices, and the limits that were asked for. The
next load of the same goes by it instead of by arithmetic.

The file is a cache: it is replaced by an atomic rename, one that is damaged or of another version
is begun anew, and one that cannot be written is a line in the log.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec
import structlog

from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import LoadRequest

VERSION = 2
FILE = "footprints.json"
_log = structlog.get_logger()

Key = tuple[str | int | None, ...]


class Measured(msgspec.Struct, frozen=True, omit_defaults=True):
    """One footprint and what it was measured of."""

    model: str
    device_class: str
    """``cpu`` or ``cuda``."""
    footprint: Footprint
    quant: str | None = None
    dtype: str = "auto"
    tensor_parallel: int = 1
    max_context_tokens: int | None = None
    max_sequences: int | None = None
    kv_cache_mb: int | None = None

    @classmethod
    def of(cls, request: LoadRequest, device: str, footprint: Footprint) -> Measured:
        """Return what *request* came to on *device*, ``cuda:0`` say."""
        return cls(
            model=request.model_id,
            device_class=device.partition(":")[0],
            footprint=footprint,
            quant=request.quant.upper() if request.quant else None,
            dtype=request.dtype,
            tensor_parallel=request.ranks,
            max_context_tokens=request.max_context_tokens,
            max_sequences=request.max_sequences,
            kv_cache_mb=request.kv_cache_mb,
        )

    @property
    def key(self) -> Key:
        """Everything but the footprint."""
        limits = (self.max_context_tokens, self.max_sequences, self.kv_cache_mb)
        how = (self.quant, self.dtype, self.tensor_parallel)
        return (self.model, self.device_class, *how, *limits)


class _File(msgspec.Struct, frozen=True):
    version: int
    measured: list[Measured]


class Footprints:
    """The footprints in *directory*; None keeps them for this run only. Reading it blocks."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / FILE
        self._all = {measured.key: measured for measured in _read(self._path)}

    def of(self, request: LoadRequest, device: str) -> Footprint | None:
        """Return what the same *request* held on a device of the same kind, None if unknown."""
        known = self._all.get(Measured.of(request, device, Footprint(0, 0, 0)).key)
        return None if known is None else known.footprint

    def keep(self, request: LoadRequest, device: str, footprint: Footprint) -> bool:
        """Remember *footprint*; return whether that is news, which ``save`` should write."""
        measured = Measured.of(request, device, footprint)
        is_news = self._all.get(measured.key) != measured
        self._all[measured.key] = measured
        return is_news

    def save(self) -> None:
        """Replace the file; blocks."""
        if self._path is None:
            return
        content = msgspec.json.format(
            msgspec.json.encode(_File(VERSION, list(self._all.values()))), indent=2
        )
        try:
            _replace(self._path, content)
        except OSError as exc:
            _log.warning("footprints not kept", file=str(self._path), error=str(exc))


def _read(path: Path | None) -> list[Measured]:
    if path is None:
        return []
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as exc:
        _log.warning("kept footprints not read", file=str(path), error=str(exc))
        return []
    return file.measured if file.version == VERSION else []


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
