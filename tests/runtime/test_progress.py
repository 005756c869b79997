"""The pace of a download, and the lines that the log has of it."""

import pytest
import structlog

from cortex.runtime.progress import DownloadLog, Pace
from supervisor_fakes import MIB, FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_without_progress_nobody_knows_when_it_ends(clock: FakeClock) -> None:
    pace = Pace(clock)

    assert (pace.eta_seconds, pace.bytes_per_second) == (None, 0.0)


def test_the_rest_takes_as_long_as_the_pace_says(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.note(0, 100)
    clock.now += 2
    pace.note(20, 100)

    assert (pace.bytes_per_second, pace.eta_seconds) == (10.0, 8.0)


def test_what_was_there_at_the_start_counts_for_no_pace(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.note(900, 1000)
    assert pace.eta_seconds is None
    clock.now += 1
    pace.note(910, 1000)

    assert pace.eta_seconds == 9.0


def test_only_the_last_seconds_count(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.note(0, 10_000)
    for _ in range(5):
        clock.now += 1
        pace.note(pace.bytes_done + 1000, 10_000)
    for _ in range(20):
        clock.now += 1
        pace.note(pace.bytes_done + 10, 10_000)

    assert pace.bytes_per_second == 10.0


def test_a_slow_pace_is_one_too(clock: FakeClock) -> None:
    pace = Pace(clock)
    for done in (0, 10, 20):
        pace.note(done, 100)
        clock.now += 30

    assert pace.bytes_per_second == pytest.approx(10 / 60)


def test_silence_makes_it_later(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.note(0, 100)
    clock.now += 5
    pace.note(50, 100)
    assert pace.eta_seconds == 5.0

    clock.now += 5
    assert pace.eta_seconds == 10.0


def test_a_size_that_nobody_knows_has_no_end(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.note(0, 0)
    clock.now += 1
    pace.note(50, 0)

    assert (pace.eta_seconds, pace.bytes_per_second) == (None, 50.0)


def test_a_new_count_begins_anew(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.note(90, 100)
    clock.now += 1
    pace.note(0, 100)
    clock.now += 1
    pace.note(10, 100)

    assert pace.bytes_per_second == 10.0


def test_the_log_has_a_start_a_line_every_ten_seconds_and_an_end(clock: FakeClock) -> None:
    heard: list[tuple[int, int]] = []
    log = DownloadLog("org/name", lambda done, total: heard.append((done, total)), clock)
    with structlog.testing.capture_logs() as lines:
        for second in range(26):
            log(second * 4 * MIB, 100 * MIB)
            clock.now += 1
        log.end()

    start, first, second_, end = lines
    assert start == {
        "event": "download started",
        "log_level": "info",
        "model": "org/name",
        "mb_done": 0.0,
        "mb_total": 100.0,
    }
    assert (first["event"], first["mb_done"], first["mb_per_second"]) == ("downloading", 40.0, 4.0)
    assert first["eta_seconds"] == 15
    assert second_["mb_done"] == 80.0
    assert (end["event"], end["seconds"]) == ("model downloaded", 26.0)
    assert end["mb_per_second"] == pytest.approx(100 / 26, abs=0.1)
    assert len(heard) == 26


def test_a_download_that_goes_on_counts_only_what_came_now(clock: FakeClock) -> None:
    log = DownloadLog("org/name", lambda *_: None, clock)
    with structlog.testing.capture_logs() as lines:
        log(90 * MIB, 100 * MIB)
        clock.now += 5
        log(100 * MIB, 100 * MIB)
        log.end()

    assert lines[0]["mb_done"] == 90.0
    assert lines[-1]["mb_per_second"] == 2.0


def test_a_model_that_was_here_is_not_logged(clock: FakeClock) -> None:
    log = DownloadLog("org/name", lambda *_: None, clock)
    with structlog.testing.capture_logs() as lines:
        log.end()

    assert lines == []
