"""Whether a device process hangs, judged by its heartbeat (``cortex.ipc.heartbeat``). Pure.

    it hangs where for a deadline                                        deadline
    the main thread has been STEPPING without a beat                     step
    the loader thread has been LOADING without a beat                    load stall
    both threads have been IDLE while the device owed us something       step

BLOCKED is no hang: the ring is full, and emptying it is our own business. The last row is a process
that was stopped, or that lost a command; it is owed something from the first look that finds a
request or a question open.

Time in which nobody looked does not count: a supervisor that was itself stopped, on a host that was
asleep, must not kill everybody when it wakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cortex.ipc.heartbeat import Activity, Beat, BeatingThread

LOOK_SECONDS = 0.5
UNSEEN_SECONDS = 5.0
"""A longer pause between two looks forgives all that went before it."""

Last = Callable[[BeatingThread], Beat]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long is too long."""

    step_seconds: float = 60.0
    load_stall_seconds: float = 300.0


class HangWatch:
    """The looks at one life of a device process; *last* is the reader's."""

    def __init__(self, last: Last, deadlines: Deadlines, now: float) -> None:
        self._last = last
        self._deadlines = deadlines
        self._looked = self._awake_since = now
        self._owed_since: float | None = None

    def look(self, now: float, *, is_owed: bool) -> str | None:
        """Return, in words, why it hangs, or None; *is_owed* is whether anything is open."""
        if now - self._looked > UNSEEN_SECONDS:
            self._awake_since, self._owed_since = now, None
        self._looked = now
        main, loader = self._last(BeatingThread.MAIN), self._last(BeatingThread.LOADER)
        is_idle = main.activity is loader.activity is Activity.IDLE
        if not (is_owed and is_idle):
            self._owed_since = None
        elif self._owed_since is None:
            self._owed_since = now
        if main.activity is Activity.STEPPING and self._is_over(main, now):
            return f"it hung: a step took more than {self._deadlines.step_seconds:g} s"
        if loader.activity is Activity.LOADING and self._has_stalled(loader, now):
            seconds = self._deadlines.load_stall_seconds
            return f"it hung: a load made no progress for {seconds:g} s"
        if self._is_deaf(max(main.at_seconds, loader.at_seconds), now):
            return f"it hung: it took no command for {self._deadlines.step_seconds:g} s"
        return None

    def _is_over(self, beat: Beat, now: float) -> bool:
        return now - max(beat.at_seconds, self._awake_since) > self._deadlines.step_seconds

    def _has_stalled(self, beat: Beat, now: float) -> bool:
        return now - max(beat.at_seconds, self._awake_since) > self._deadlines.load_stall_seconds

    def _is_deaf(self, last_beat_seconds: float, now: float) -> bool:
        if self._owed_since is None:
            return False
        return now - max(self._owed_since, last_beat_seconds) > self._deadlines.step_seconds
