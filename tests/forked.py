"""A fork server of a test module's own: multiprocessing has one per process."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from cortex.runtime import fork_server

TESTS = Path(__file__).resolve().parent


@contextlib.contextmanager
def forking(preload: str) -> Iterator[None]:
    """Have a fork server that imports *preload*; gone again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv(fork_server.SUPERVISOR_PID, "")
        if left_by_other_tests := fork_server.server_pid():
            kill(left_by_other_tests)
        fork_server.prepare(preload)
        yield
        kill(fork_server.server_pid())
        forkserver.set_forkserver_preload(["__main__"])
        atexit.unregister(fork_server.kill_all)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that is there."""
    assert pid is not None
    os.kill(pid, number)
