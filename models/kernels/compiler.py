"""Compiles cpu_ops.c for this machine at first use and keeps the result.

The library lies in the user's cache directory under a hash of all that went into it: source,
compiler, flags and the CPU's features. It is compiled beside its place and moved there, so that
processes which start together never see half a file. Where there is no cache to write it is
compiled into a directory that is gone once the library is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_ops.c")
INCLUDED = tuple(
    SOURCE.with_name(name)
    for name in (
        "thread_pool.c",
        "stored_blocks.c",
        "quantized_tiles.c",
        "quantized_linear.c",
        "fp8_linear.c",
        "quantize.c",
        "experts.c",
        "paged_attention.c",
        "gated_delta.c",
        "program.c",
        "sampling.c",
    )
)
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
FLAGS = ("-O3", NATIVE, "-std=gnu11", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-w")
TIMEOUT_SECONDS = 120
CPU_FEATURES = ("flags", "Features")  # their names in /proc/cpuinfo on x86-64 and aarch64


class KernelsUnavailable(RuntimeError):
    """The library cannot be compiled or loaded here; the text says why."""


def load_library() -> ctypes.CDLL:
    """Load the library, compiling it if need be; raises KernelsUnavailable."""
    compiler = _find_compiler()
    name = f"cpu_ops-{_fingerprint(compiler)}.so"
    try:
        return _load_cached(compiler, cache_directory() / name)
    except OSError:
        return _load_uncached(compiler, name)


def cache_directory() -> Path:
    """Where compiled libraries are kept (XDG base directory specification); raises OSError."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else _home() / ".cache") / "cortex/kernels"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as exc:
        raise FileNotFoundError("this user has no home directory") from exc


def _find_compiler() -> str:
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise KernelsUnavailable("no C compiler is installed; install gcc")


def _fingerprint(compiler: str) -> str:
    parts = (
        SOURCE.read_text(),
        *(included.read_text() for included in INCLUDED),
        _run(compiler, "--version"),
        *FLAGS,
        _cpu_features(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(CPU_FEATURES)), platform.processor())


def _load_cached(compiler: str, path: Path) -> ctypes.CDLL:
    """Load *path*, compiling it first if it is missing or damaged; raises OSError."""
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _load_uncached(compiler: str, name: str) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="cortex-kernels-") as directory:
            path = Path(directory) / name
            _compile(compiler, path)
            return ctypes.CDLL(str(path))
    except OSError as exc:
        raise KernelsUnavailable(f"the library cannot be written or loaded: {exc}") from exc


def _compile(compiler: str, path: Path) -> None:
    """Compile to *path*, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as directory:
        output = Path(directory) / path.name
        _run(compiler, *FLAGS, "-o", str(output), str(SOURCE), "-lm")
        output.replace(path)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a compiler found on PATH, our own arguments
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except subprocess.CalledProcessError as exc:
        raise KernelsUnavailable(f"{command[0]} failed: {exc.stderr.strip()[:400]}") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise KernelsUnavailable(f"{command[0]} failed: {exc}") from exc
    return done.stdout
