"""A process in which Triton's kernels are interpreted in numpy instead of being compiled.

Triton decides that when it is imported, and nothing else in the suite shall depend on it; so there
is a process of its own, in which ``triton_cases`` compares kernels with their references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest

Interpreted = Callable[..., Any]
"""Calls a function of a module that the process can import, with these arguments, and returns."""


@contextmanager
def interpreter() -> Iterator[Interpreted]:
    """Run a process that interprets Triton's kernels."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(_use_one_thread).result()  # which starts it, in this environment
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
