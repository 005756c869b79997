"""A process that dies when the one it serves dies, whatever it is doing and whoever is killed.

Two links, both pulled by the kernel, so that no interpreter has to run (a child may be in C code
that holds the interpreter's lock):

- the parent-death signal, supervisor -> fork server -> device process, set by each on itself;
- the pipe that multiprocessing keeps open from the supervisor to each child: its hang-up is
  delivered as SIGKILL (O_ASYNC with F_SETSIG), past the fork server.

Each alone held in every trial; they fail differently, so both are used. A process in
uninterruptible sleep (a stuck driver) dies when the driver lets go; nothing helps there.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import select
import signal

_PR_SET_PDEATHSIG = 1
_F_SETSIG = 10
_libc = ctypes.CDLL(None, use_errno=True)


def ignore_stop_signals() -> None:
    """Leave SIGINT and SIGTERM to the supervisor; they reach the whole group, or the whole unit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(expected_pid: int) -> None:
    """Have the kernel send SIGKILL when the *thread* that created this process ends.

    Children do not inherit it. Exits at once where the parent is no longer *expected_pid*: it died
    before the call.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != expected_pid:
        os._exit(1)


def die_with_supervisor() -> None:
    """Have the kernel send SIGKILL when the far end of this child's parent pipe closes.

    For processes started by multiprocessing only. Exits at once where it has closed already.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child of multiprocessing has a parent pipe"
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    looking = select.poll()
    looking.register(pipe, select.POLLIN)
    if looking.poll(0):
        os._exit(1)
