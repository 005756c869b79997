"""The table of device states, row by row."""

from typing import get_args

import pytest

from cortex.ipc import node_api
from cortex.runtime.device_state import On, State, after, backoff_seconds, loss, public, recent

S, R, P = State, State.RESTARTING, State.POISONED

ROWS = [
    (S.STARTING, On.HELLO, S.READY),
    (S.RESTARTING, On.HELLO, S.READY),
    (S.STOPPING, On.HELLO, S.STOPPING),
    (S.STARTING, On.LOST, R),
    (S.READY, On.LOST, R),
    (S.RESTARTING, On.LOST, R),
    (S.STOPPING, On.LOST, S.STOPPED),
    (S.STARTING, On.LOST_TOO_OFTEN, P),
    (S.READY, On.LOST_TOO_OFTEN, P),
    (S.RESTARTING, On.LOST_TOO_OFTEN, P),
    (S.STARTING, On.RESTART, R),
    (S.READY, On.RESTART, R),
    (S.RESTARTING, On.RESTART, R),
    (S.POISONED, On.RESTART, R),
    (S.STARTING, On.STOP, S.STOPPING),
    (S.READY, On.STOP, S.STOPPING),
    (S.RESTARTING, On.STOP, S.STOPPING),
    (S.POISONED, On.STOP, S.STOPPING),
    (S.STOPPING, On.STOP, S.STOPPING),
]
EVERYTHING = [(state, on) for state in State for on in On]
IMPOSSIBLE = [pair for pair in EVERYTHING if pair not in {(state, on) for state, on, _ in ROWS}]


@pytest.mark.parametrize(("state", "on", "becomes"), ROWS)
def test_a_device_in_a_state_becomes(state: State, on: On, becomes: State) -> None:
    assert after(state, on) is becomes


@pytest.mark.parametrize(("state", "on"), IMPOSSIBLE)
def test_what_cannot_happen_in_a_state_is_refused_in_words(state: State, on: On) -> None:
    with pytest.raises(ValueError, match=f"{on} cannot happen to a device that is {state}"):
        after(state, on)


@pytest.mark.parametrize("state", State)
def test_every_state_has_a_public_name(state: State) -> None:
    assert public(state) in get_args(node_api.DeviceState)


def test_the_fourth_failure_that_counts_is_one_too_many() -> None:
    assert [loss([0.0] * failures) for failures in (1, 2, 3, 4)] == [
        On.LOST,
        On.LOST,
        On.LOST,
        On.LOST_TOO_OFTEN,
    ]


def test_a_failure_counts_for_ten_minutes() -> None:
    assert recent([0.0, 1.0, 599.0], 600.5) == [1.0, 599.0]


def test_the_back_off_grows_and_ends_at_ten_seconds() -> None:
    assert [backoff_seconds(failures) for failures in (1, 2, 3, 9)] == [0.1, 1.0, 10.0, 10.0]
