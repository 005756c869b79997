"""The compiled kernels, for this CPU and for older ones of its kind; and Triton's, interpreted."""

from __future__ import annotations

import ctypes
import fcntl
import platform
from collections.abc import Iterator

import pytest

from cortex.models.kernels import compiler, cpu
from interpreted import Interpreted, interpreter

OLDER = {
    "x86_64": {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx2 without fma": ["-mavx2"], "plain": []}
}


@pytest.fixture(scope="session")
def kernels() -> cpu.CpuKernels:
    found = cpu.kernels()
    assert found is not None, "the tests need a C compiler"
    return found


@pytest.fixture(scope="session")
def other_kernels() -> dict[str, cpu.CpuKernels]:
    """The same source for older CPUs of this kind; kept as the library is, for the next run too."""
    return {
        name: cpu.CpuKernels(_compiled_with(flags))
        for name, flags in OLDER.get(platform.machine(), {}).items()
    }


def _compiled_with(flags: list[str]) -> ctypes.CDLL:
    """Compile once, whatever other processes of this run do: it takes half a minute of a CPU."""
    directory = compiler.cache_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = [flag for flag in compiler.FLAGS if flag not in {compiler.NATIVE, "-O3"}]
    with (directory / "tests.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setattr(compiler, "FLAGS", (*kept, "-O1", *flags))
        return compiler.load_library()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    """Calls a function of ``triton_cases`` where Triton's kernels are interpreted.

    Its process ends with the module: other tests look for processes that were left behind.
    """
    with interpreter() as call:
        yield call
