"""The compiled kernels, for this CPU and for older ones of its kind; and Triton's, interpreted."""

from __future__ import annotations

import ctypes
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
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, cpu.CpuKernels]:
    """The same source for older CPUs of this kind."""
    compiled = {}
    for name, flags in OLDER.get(platform.machine(), {}).items():
        path = tmp_path_factory.mktemp("kernels") / f"{name}.so"
        kept = [flag for flag in compiler.FLAGS if flag not in {compiler.NATIVE, "-O3"}]
        compiler._run("cc", *kept, "-O1", *flags, "-o", str(path), str(compiler.SOURCE), "-lm")
        compiled[name] = cpu.CpuKernels(ctypes.CDLL(str(path)))
    return compiled


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    """Calls a function of ``triton_cases`` where Triton's kernels are interpreted.

    Its process ends with the module: other tests look for processes that were left behind.
    """
    with interpreter() as call:
        yield call
