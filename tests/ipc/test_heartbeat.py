"""The heartbeat page: two words, each whole whenever it is read."""

import multiprocessing
import time
from collections.abc import Iterator

import pytest

from cortex.ipc.heartbeat import (
    Activity,
    Beat,
    BeatingThread,
    HeartbeatPage,
    HeartbeatReader,
    HeartbeatWriter,
)
from heartbeat_child import BEATS, beat_often


@pytest.fixture
def page() -> Iterator[HeartbeatPage]:
    page = HeartbeatPage()
    yield page
    page.close()


def test_who_never_beat_has_been_idle_since_ever(page: HeartbeatPage) -> None:
    reader = HeartbeatReader(page)

    assert [reader.last(thread) for thread in BeatingThread] == [Beat(Activity.IDLE, 0.0)] * 2


@pytest.mark.parametrize("activity", list(Activity))
def test_a_beat_says_what_and_when(page: HeartbeatPage, activity: Activity) -> None:
    HeartbeatWriter(page, lambda: 1_500_000_000).main(activity)

    assert HeartbeatReader(page).last(BeatingThread.MAIN) == Beat(activity, 1.5)


def test_the_threads_do_not_hide_each_other(page: HeartbeatPage) -> None:
    writer = HeartbeatWriter(page, lambda: 7_000_000_000)
    writer.loader(Activity.LOADING)
    writer.main(Activity.STEPPING)

    reader = HeartbeatReader(page)
    assert reader.last(BeatingThread.LOADER) == Beat(Activity.LOADING, 7.0)
    assert reader.last(BeatingThread.MAIN) == Beat(Activity.STEPPING, 7.0)


def test_beats_are_told_by_the_clock_that_the_supervisor_has(page: HeartbeatPage) -> None:
    before = time.monotonic()
    HeartbeatWriter(page).main(Activity.STEPPING)

    assert before <= HeartbeatReader(page).last(BeatingThread.MAIN).at_seconds <= time.monotonic()


def test_a_beat_of_another_process_is_never_half_written(page: HeartbeatPage) -> None:
    reader = HeartbeatReader(page)
    child = multiprocessing.get_context("forkserver").Process(target=beat_often, args=(page,))
    child.start()
    torn, seen, last = [], 0, 0.0
    while last < BEATS:
        beat = reader.last(BeatingThread.MAIN)
        if beat.at_seconds < last or beat.at_seconds % 1:
            torn.append(beat)
        seen, last = seen + (beat.at_seconds != last), beat.at_seconds
    child.join(20.0)

    assert (torn, child.exitcode) == ([], 0)
    assert seen > 1


def test_closing_gives_everything_back(page: HeartbeatPage) -> None:
    reader = HeartbeatReader(page)
    reader.close()
    page.close()

    assert page.memory.fd == -1
