"""Nothing outlives a supervisor, whatever its children are doing."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 3.0


@contextlib.contextmanager
def victim(how: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a supervisor; yield it and the pidfds of everything it started."""
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "supervisor_victim.py"), how],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pidfds: list[int] = []
    try:
        line = process.stdout.readline()
        assert line, "the supervisor did not start"
        pidfds = [os.pidfd_open(pid) for pid in json.loads(line)]
        yield process, pidfds
    finally:
        process.kill()
        process.communicate()
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def seconds_until_gone(pidfds: list[int]) -> float:
    """Wait until every process is gone; fail if one stays."""
    began, left = time.monotonic(), set(pidfds)
    while left:
        gone, _, _ = select.select(list(left), [], [], DEADLINE_SECONDS)
        assert gone, f"{len(left)} of {len(pidfds)} processes outlived their supervisor"
        left.difference_update(gone)
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["idle", "spin", "gil"])
def test_sigkill_of_the_supervisor_leaves_no_process(how: str) -> None:
    with victim(how) as (process, pidfds):
        process.kill()

        assert seconds_until_gone(pidfds) < DEADLINE_SECONDS


@pytest.mark.parametrize("how", ["idle", "gil"])
def test_sigkill_of_the_fork_server_ends_its_children(how: str) -> None:
    with victim(how) as (_, [server, _tracker, *children]):
        signal.pidfd_send_signal(server, signal.SIGKILL)

        assert seconds_until_gone(children) < DEADLINE_SECONDS


def test_a_supervisor_that_fails_ends_and_leaves_no_process() -> None:
    with victim("fail") as (process, pidfds):
        assert seconds_until_gone(pidfds) < DEADLINE_SECONDS
        _, complaint = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 1
    assert "a bug in the supervisor" in complaint


def test_nothing_is_left_in_shared_memory() -> None:
    before = set(Path("/dev/shm").iterdir())
    with victim("idle") as (process, pidfds):
        during = set(Path("/dev/shm").iterdir())
        process.kill()
        seconds_until_gone(pidfds)

    assert before == during == set(Path("/dev/shm").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_to_the_whole_group_leave_the_children_to_the_supervisor(
    number: signal.Signals,
) -> None:
    with victim("idle") as (_, [server, _tracker, *children]):
        for pidfd in (server, *children):
            signal.pidfd_send_signal(pidfd, number)

        assert select.select([server, *children], [], [], 0.2) == ([], [], [])


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    code = "from cortex.runtime.lifeline import die_with_parent; die_with_parent(1); print('here')"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)

    assert (ended.returncode, ended.stdout) == (1, b"")
