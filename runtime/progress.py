"""How fast a download or a load goes, and what the log hears of it."""

from __future__ import annotations

from collections import deque

import structlog

from cortex.runtime.device_process import Clock
from cortex.runtime.wheel import OnProgress

WINDOW_SECONDS = 10.0
LOG_SECONDS = 10.0
MIB = 2**20

_log = structlog.get_logger()


class Pace:
    """Bytes done and in all, and how long the rest takes at the pace of the last ten seconds.

    What was done before the first note, in an earlier life of a download say, counts for no pace;
    nor does what was quick an hour ago.
    """

    def __init__(self, clock: Clock) -> None:
        self.bytes_done = 0
        self.bytes_total = 0
        self._clock = clock
        self._notes: deque[tuple[float, int]] = deque()

    def note(self, bytes_done: int, bytes_total: int) -> None:
        """Note how far it has come."""
        now = self._clock()
        self.bytes_done, self.bytes_total = bytes_done, bytes_total
        if self._notes and bytes_done < self._notes[-1][1]:  # another phase
            self._notes.clear()
        self._notes.append((now, bytes_done))
        while len(self._notes) > 1 and now - self._notes[1][0] >= WINDOW_SECONDS:
            self._notes.popleft()  # one that is older than the window stays: it begins there

    @property
    def bytes_per_second(self) -> float:
        """The pace until now; silence slows it down."""
        if not self._notes:
            return 0.0
        began, done = self._notes[0]
        seconds = self._clock() - began
        return (self.bytes_done - done) / seconds if seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """How long the rest takes; None where nobody can say."""
        left, pace = self.bytes_total - self.bytes_done, self.bytes_per_second
        return left / pace if self.bytes_total and left >= 0 and pace > 0 else None


class DownloadLog:
    """Passes on how far a download is, and logs its start, its course now and then, its end.

    A model that was here already reports nothing, and nothing is logged of it.
    """

    def __init__(self, model_id: str, report: OnProgress, clock: Clock) -> None:
        self._model_id = model_id
        self._report = report
        self._clock = clock
        self._pace = Pace(clock)
        self._began: tuple[float, int] | None = None
        self._logged_at = 0.0

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        """Hear of progress."""
        self._report(bytes_done, bytes_total)
        self._pace.note(bytes_done, bytes_total)
        now = self._clock()
        if self._began is None:
            self._began, self._logged_at = (now, bytes_done), now
            self._say("download started")
        elif now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            eta = self._pace.eta_seconds
            self._say(
                "downloading",
                mb_per_second=_mb(self._pace.bytes_per_second),
                eta_seconds=None if eta is None else round(eta),
            )

    def end(self) -> None:
        """Hear that all of it is here."""
        if self._began is not None:
            at, done = self._began
            seconds = self._clock() - at
            came = self._pace.bytes_done - done
            pace = _mb(came / seconds) if seconds > 0 else None
            self._say("model downloaded", seconds=round(seconds, 3), mb_per_second=pace)

    def _say(self, event: str, **numbers: float | None) -> None:
        total = self._pace.bytes_total
        _log.info(
            event,
            model=self._model_id,
            mb_done=_mb(self._pace.bytes_done),
            mb_total=_mb(total) if total else None,
            **numbers,
        )


def _mb(count: float) -> float:
    return round(count / MIB, 1)
