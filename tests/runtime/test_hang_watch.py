"""What counts as a hang, row by row, and what does not."""

import pytest

from cortex.ipc.heartbeat import Activity, Beat, BeatingThread
from cortex.runtime.hang_watch import LOOK_SECONDS, UNSEEN_SECONDS, Deadlines, HangWatch

START = 1000.0
DEADLINES = Deadlines(step_seconds=10.0, load_stall_seconds=30.0)


class Watched:
    """A device process that beats when told to, and time that passes between two looks."""

    def __init__(self) -> None:
        self.now = START
        self.beats = {thread: Beat(Activity.IDLE, 0.0) for thread in BeatingThread}
        self.watch = HangWatch(self.beats.__getitem__, DEADLINES, START)

    def beat(self, activity: Activity, thread: BeatingThread = BeatingThread.MAIN) -> None:
        self.beats[thread] = Beat(activity, self.now)

    def after(self, seconds: float, *, is_owed: bool = False) -> str | None:
        """Let time pass, looking all along; return the first that is found."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_SECONDS
            if found := self.watch.look(self.now, is_owed=is_owed):
                return found
        return None


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_step_beyond_its_deadline_is_a_hang(watched: Watched) -> None:
    watched.beat(Activity.STEPPING)

    assert watched.after(10) is None
    assert watched.after(1) == "it hung: a step took more than 10 s"


def test_every_step_has_the_whole_deadline(watched: Watched) -> None:
    for _ in range(3):
        watched.beat(Activity.STEPPING)
        assert watched.after(9) is None


def test_a_load_may_take_long_but_not_without_progress(watched: Watched) -> None:
    for _ in range(3):
        watched.beat(Activity.LOADING, BeatingThread.LOADER)
        assert watched.after(29, is_owed=True) is None

    assert watched.after(2) == "it hung: a load made no progress for 30 s"


def test_a_step_that_hangs_beside_a_load_is_seen(watched: Watched) -> None:
    watched.beat(Activity.STEPPING)
    for _ in range(10):
        watched.beat(Activity.LOADING, BeatingThread.LOADER)
        assert watched.after(1) is None
    watched.beat(Activity.LOADING, BeatingThread.LOADER)

    assert "a step" in (watched.after(1) or "")


def test_a_full_ring_is_no_hang_of_the_device(watched: Watched) -> None:
    watched.beat(Activity.BLOCKED)

    assert watched.after(1000, is_owed=True) is None


def test_a_device_that_has_nothing_to_do_may_be_idle_for_ever(watched: Watched) -> None:
    assert watched.after(1000) is None


def test_a_device_that_takes_no_command_hangs(watched: Watched) -> None:
    watched.after(1000)

    assert watched.after(10, is_owed=True) is None
    assert watched.after(1, is_owed=True) == "it hung: it took no command for 10 s"


def test_one_that_works_off_what_it_owes_is_not_deaf(watched: Watched) -> None:
    for _ in range(5):
        watched.beat(Activity.STEPPING)
        assert watched.after(2, is_owed=True) is None
        watched.beat(Activity.IDLE)
        assert watched.after(9, is_owed=True) is None


def test_a_question_that_a_load_answers_is_not_owed_by_the_main_thread(watched: Watched) -> None:
    watched.beat(Activity.LOADING, BeatingThread.LOADER)

    assert watched.after(29, is_owed=True) is None


def test_time_in_which_nobody_looked_does_not_count(watched: Watched) -> None:
    watched.beat(Activity.STEPPING)
    watched.now += 3600

    assert watched.after(10) is None
    assert watched.after(1) is not None


def test_a_supervisor_that_is_busy_for_a_moment_still_sees_a_hang(watched: Watched) -> None:
    watched.beat(Activity.STEPPING)
    found = []
    for _ in range(3):
        watched.now += UNSEEN_SECONDS - LOOK_SECONDS
        found.append(watched.after(LOOK_SECONDS))

    assert found[-1] is not None


def test_what_was_owed_while_nobody_looked_does_not_count(watched: Watched) -> None:
    watched.after(5, is_owed=True)
    watched.now += 3600

    assert watched.after(10, is_owed=True) is None
