"""The writing end of a heartbeat, in a process of its own; importable by name from a child."""

from itertools import count

from cortex.ipc.heartbeat import Activity, HeartbeatPage, HeartbeatWriter

BEATS = 300_000


def beat_often(page: HeartbeatPage) -> None:
    """Beat at second 1, 2, 3, ... of a clock of its own."""
    seconds = count(1)
    writer = HeartbeatWriter(page, lambda: next(seconds) * 1_000_000_000)
    for _ in range(BEATS):
        writer.main(Activity.STEPPING)
