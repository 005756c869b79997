"""Several threads of a program, and children forked from it, share one pool of helpers."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cortex.models.kernels import cpu
from cortex.models.quantization import Part


def test_python_threads_that_compute_at_once_do_not_disturb_each_other() -> None:
    kernels = cpu.kernels()
    assert kernels is not None, "the tests need a C compiler"
    part = Part("F32", torch.randn(500, 64).view(torch.uint8))
    inputs = [torch.randn(3, 64) for _ in range(6)]
    expected = [kernels.linear(x, [part]) for x in inputs]

    def often(x: Tensor) -> list[Tensor]:
        return [kernels.linear(x, [part]) for _ in range(200)]

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(often, inputs))

    for wanted, found in zip(expected, results, strict=True):
        assert all(torch.equal(wanted, y) for y in found)


FORKS = """
import os, torch
from pathlib import Path
from cortex.models.kernels import cpu
from cortex.models.quantization import Part

torch.set_num_threads(3)
part = Part("F32", torch.randn(500, 64).view(torch.uint8))
x = torch.randn(3, 64)
expected = cpu.kernels().linear(x, [part])
if os.fork() == 0:
    equal = torch.equal(cpu.kernels().linear(x, [part]), expected)
    threads = len(list(Path("/proc/self/task").iterdir()))
    os._exit(0 if equal and threads == 3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS]  # forking with threads is warned of

    assert subprocess.run(command, timeout=60, check=False).returncode == 0


FORKS_WITHIN_A_LOOP = """
import os, signal, threading, torch
from cortex.models.kernels import cpu
from cortex.models.quantization import Part

torch.set_num_threads(3)
kernels, part = cpu.kernels(), Part("F32", torch.randn(60000, 64).view(torch.uint8))
x = torch.randn(64, 64)
expected = kernels.linear(x, [part])
is_over = threading.Event()

def compute():
    while not is_over.is_set():
        kernels.linear(x, [part])

thread = threading.Thread(target=compute)
thread.start()
codes = []
while len(codes) < 12 and not any(codes):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(kernels.linear(x, [part]), expected) else 1)
    codes.append(os.waitpid(child, 0)[1])
is_over.set()
thread.join()
raise SystemExit(any(codes))
"""


def test_a_child_forked_within_another_threads_loop_leaves_that_loop_alone() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS_WITHIN_A_LOOP]

    assert subprocess.run(command, timeout=60, check=False).returncode == 0
