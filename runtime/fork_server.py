"""The process that has torch imported and forks device processes from it in milliseconds.

It is multiprocessing's fork server with our preload. ``prepare`` starts it first thing in the
daemon, on the main thread: its parent-death signal follows the thread that launched it. While the
daemon runs, ``ForkServer`` watches it and starts another when it dies. Everything that
multiprocessing blocks for (a start waits for the whole import of torch) happens in one thread of
our own, which also keeps two readers away from a child's status pipe.

A child is known by its pidfd, never by its number alone: the sentinel of multiprocessing also fires
when the fork server dies, while the child may still hold its memory.

This is the one file of the supervisor that names ``cortex.runtime.device``, and only lazily.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import faulthandler
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any, Protocol

import structlog

from cortex.runtime import lifeline

PRELOAD = "cortex.runtime.preload"
SUPERVISOR_PID = "_CORTEX_SUPERVISOR_PID"
"""Environment variable that tells the fork server whose death it must not survive."""

START_TIMEOUT_SECONDS = 60.0  # the import of torch from a cold disk is most of it
CRASH_LOOP_SECONDS = 1.0
_log = structlog.get_logger()


class Child(Protocol):
    """A running child: its number, the moment it is gone, and the only way to end it."""

    pid: int
    gone: asyncio.Future[None]

    def kill(self) -> None:
        """Send SIGKILL; a child that is gone is not an error."""

    def is_gone(self) -> bool:
        """Whether it is gone, also where the loop has not heard of that yet."""

    async def exit_code(self) -> int | None:
        """Return how it ended, minus the signal's number where one did; None where unknown."""


def prepare(preload: str = PRELOAD) -> None:
    """Start the fork server; call it once, on the main thread, before any loop or thread."""
    atexit.register(kill_all)
    os.environ[SUPERVISOR_PID] = str(os.getpid())
    forkserver.set_forkserver_preload([preload])
    ensure_running()


def ensure_running() -> None:
    """Start the fork server if it is not running; returns at once, its import goes on behind."""
    assert threading.current_thread() is threading.main_thread(), "it would die with this thread"
    forkserver.ensure_running()


def server_pid() -> int | None:
    """Return the fork server's process number, for which multiprocessing has no public name."""
    pid: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)  # noqa: SLF001 - see above
    return pid


def kill_all() -> None:
    """Kill every child; runs before multiprocessing's own exit hook, which would join for ever.

    (It sends SIGTERM, which device processes ignore.)
    """
    for process in multiprocessing.active_children():
        process.kill()


def set_title(title: str) -> None:
    """Show this process as *title* in ps and top."""
    import setproctitle

    setproctitle.setproctitle(title)


def import_device_main() -> Callable[..., None]:
    """Import what a device process runs, torch included, and return it. Never in the supervisor."""
    from cortex.runtime.device.main import main

    return main


def run_device(**arguments: Any) -> None:
    """Be a device process; the target of the fork."""
    import_device_main()(**arguments)


def _enter(preload: str, target: Callable[..., None], title: str, **arguments: Any) -> None:
    """First lines of every child: tie it to its parents, then run *target*."""
    preloaded = sys.modules.get(preload)  # absent where the fork server failed to import it
    if preloaded is not None:
        lifeline.die_with_parent(preloaded.SERVER_PID)
    lifeline.die_with_supervisor()
    lifeline.ignore_stop_signals()
    faulthandler.enable()
    set_title(title)
    threads = preloaded.SERVER_THREADS if preloaded is not None else 0
    target(**arguments, preloaded=preloaded is not None, server_threads=threads)


class ForkedChild:
    """A child of the fork server."""

    def __init__(self, process: ForkServerProcess, thread: concurrent.futures.Executor) -> None:
        assert process.pid is not None, "it has been started"
        self.pid = process.pid
        self._process = process
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self.gone = self._loop.create_future()
        self._pidfd = _open_pidfd(self.pid)
        if self._pidfd < 0:
            self.gone.set_result(None)
        else:
            self._loop.add_reader(self._pidfd, self._on_gone)

    def kill(self) -> None:
        """Send SIGKILL; a child that is gone is not an error."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def is_gone(self) -> bool:
        """Whether it is gone, also where the loop has not heard of that yet."""
        return self._pidfd < 0 or _has_ended(self._pidfd, wait_ms=0)

    async def exit_code(self) -> int | None:
        """Return how it ended, and give up what multiprocessing holds of it."""
        return await self._loop.run_in_executor(self._thread, self._reap)

    def _on_gone(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.gone.set_result(None)

    def _reap(self) -> int | None:
        self._process.join(1.0)  # its exit code comes by way of the fork server
        code = self._process.exitcode
        if code is not None:
            self._process.close()
        return None if code == 255 else code  # 255: the fork server died before it could tell


class ForkServer:
    """The supervisor's handle on the fork server; make it in the event loop of the main thread."""

    def __init__(
        self,
        target: Callable[..., None] = run_device,
        *,
        preload: str = PRELOAD,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
    ) -> None:
        assert SUPERVISOR_PID in os.environ, "call prepare() first thing in the process"
        self._target = target
        self._preload = preload
        self._start_timeout_seconds = start_timeout_seconds
        self._context = multiprocessing.get_context("forkserver")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "fork-server")
        self._loop = asyncio.get_running_loop()
        self._living: set[ForkedChild] = set()
        self._starting = 0
        self._pid: int | None = None
        self._pidfd = -1
        self._launched = time.monotonic()
        self._watch()

    @property
    def pid(self) -> int | None:
        """The fork server's process number."""
        return self._pid

    async def fork(self, title: str, **arguments: Any) -> Child:
        """Start a child that runs ``target(**arguments, preloaded=..., server_threads=...)``.

        Raise OSError where it cannot be started, also (TimeoutError) where that takes too long.
        """
        try:
            return await self._fork(title, **arguments)
        except TimeoutError:
            await self._give_up_start()
            raise TimeoutError(
                f"the fork server started nothing in {self._start_timeout_seconds:g} s"
            ) from None
        except OSError:  # the fork server died in between: once more, by another one
            return await self._fork(title, **arguments)

    def close(self) -> None:
        """Stop watching. The fork server itself ends with this process."""
        self._unwatch()
        if self._starting:
            self._kill_server()  # or a start that hangs would keep this process from ending
        self._thread.shutdown(wait=False)

    async def _fork(self, title: str, **arguments: Any) -> Child:
        ensure_running()
        self._watch()
        process = self._context.Process(
            target=_enter,
            args=(self._preload, self._target, title),
            kwargs=arguments,
            name=title,
            daemon=True,
        )
        await self._start(process)
        self._watch()  # a start may have launched another server
        child = ForkedChild(process, self._thread)
        self._living.add(child)
        child.gone.add_done_callback(lambda _: self._living.discard(child))
        return child

    async def _start(self, process: ForkServerProcess) -> None:
        started = self._thread.submit(process.start)
        self._starting += 1
        started.add_done_callback(self._count_started)
        try:
            async with asyncio.timeout(self._start_timeout_seconds):
                await asyncio.shield(asyncio.wrap_future(started))
        except (TimeoutError, asyncio.CancelledError):
            started.add_done_callback(lambda late: _kill_late(process, late))
            raise
        except EOFError as exc:
            raise ConnectionResetError("the fork server died") from exc

    def _count_started(self, _: concurrent.futures.Future[None]) -> None:
        self._starting -= 1

    async def _give_up_start(self) -> None:
        """Kill a fork server that forks nothing, unless it would take healthy children along.

        It is waited for: while it still dies, multiprocessing would take it for a good one.
        """
        pid = server_pid()
        if not self._living and pid is not None:
            self._kill_server()
            await asyncio.to_thread(_wait_for_end, pid)

    def _kill_server(self) -> None:
        pid = server_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # our own child, not reaped yet: the number is its

    def _watch(self) -> None:
        pid = server_pid()
        if pid is None or pid == self._pid:
            return
        self._unwatch()
        self._pid = pid
        self._launched = time.monotonic()
        self._pidfd = _open_pidfd(pid)
        if self._pidfd >= 0:
            self._loop.add_reader(self._pidfd, self._on_server_gone)

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._pidfd = -1

    def _on_server_gone(self) -> None:
        self._unwatch()
        _log.warning("fork server lost", server_pid=self._pid)
        if time.monotonic() - self._launched > CRASH_LOOP_SECONDS:
            ensure_running()  # else the next start does it, at the pace of the devices' back-off
            self._watch()


def _open_pidfd(pid: int) -> int:
    """Return a pidfd, or -1 where the process is gone already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _wait_for_end(pid: int) -> None:
    """Return when a killed process is gone, or after a second."""
    pidfd = _open_pidfd(pid)
    if pidfd >= 0:
        _has_ended(pidfd, wait_ms=1000)
        os.close(pidfd)


def _has_ended(pidfd: int, wait_ms: int) -> bool:
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(wait_ms))


def _kill_late(process: ForkServerProcess, started: concurrent.futures.Future[None]) -> None:
    """Kill a child whose start succeeded after nobody waited for it any more."""
    if not started.cancelled() and started.exception() is None:
        process.kill()
