"""The table of model states, row by row."""

from typing import get_args

import pytest

from cortex.ipc import node_api
from cortex.runtime.model_state import On, State, after, phase, public

S = State

ROWS = [
    (S.QUEUED, On.TURN, S.DOWNLOADING),
    (S.DOWNLOADING, On.FETCHED, S.LOADING),
    (S.LOADING, On.LOADED, S.LOADED),
    (S.RECOVERING, On.LOADED, S.LOADED),
    (S.QUEUED, On.FAILED, S.FAILED),
    (S.DOWNLOADING, On.FAILED, S.FAILED),
    (S.LOADING, On.FAILED, S.FAILED),
    (S.RECOVERING, On.FAILED, S.FAILED),
    (S.UNLOADING, On.FAILED, S.FAILED),
    (S.LOADED, On.DEVICE_LOST, S.RECOVERING),
    (S.RECOVERING, On.DEVICE_LOST, S.RECOVERING),
    (S.QUEUED, On.UNLOAD, S.UNLOADING),
    (S.DOWNLOADING, On.UNLOAD, S.UNLOADING),
    (S.LOADING, On.UNLOAD, S.UNLOADING),
    (S.LOADED, On.UNLOAD, S.UNLOADING),
    (S.RECOVERING, On.UNLOAD, S.UNLOADING),
    (S.FAILED, On.UNLOAD, S.UNLOADING),
]
EVERYTHING = [(state, on) for state in State for on in On]
IMPOSSIBLE = [pair for pair in EVERYTHING if pair not in {(state, on) for state, on, _ in ROWS}]


@pytest.mark.parametrize(("state", "on", "becomes"), ROWS)
def test_a_model_in_a_state_becomes(state: State, on: On, becomes: State) -> None:
    assert after(state, on) is becomes


@pytest.mark.parametrize(("state", "on"), IMPOSSIBLE)
def test_what_cannot_happen_in_a_state_is_refused_in_words(state: State, on: On) -> None:
    with pytest.raises(ValueError, match=f"{on} cannot happen to a model that is {state}"):
        after(state, on)


@pytest.mark.parametrize("state", State)
def test_every_state_has_a_public_name(state: State) -> None:
    assert public(state) in get_args(node_api.ModelStatus)


def test_loading_covers_three_states_told_apart_by_the_phase() -> None:
    on_the_way = {state: phase(state) for state in State if public(state) == "loading"}

    assert on_the_way == {
        S.QUEUED: "queued",
        S.DOWNLOADING: "downloading",
        S.LOADING: "loading",
    }


def test_a_model_that_is_not_on_its_way_has_no_phase() -> None:
    assert {phase(s) for s in (S.LOADED, S.RECOVERING, S.UNLOADING, S.FAILED)} == {None}
