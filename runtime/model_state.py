"""The states of a model on its device, as a table; the supervisor is its only writer.

    model                        on            becomes       does
    QUEUED                       TURN          DOWNLOADING   fetch, or find, its files
    DOWNLOADING                  FETCHED       LOADING       LoadModel, to a device that is ready
    LOADING, RECOVERING          LOADED        LOADED        answer the waiters
    QUEUED ... LOADING,
    RECOVERING, UNLOADING        FAILED        FAILED        answer the waiters; shown ten minutes
    LOADED, RECOVERING           DEVICE_LOST   RECOVERING    load again when the device is back
    any but UNLOADING            UNLOAD        UNLOADING     stop a download, UnloadModel; then gone

A model whose device dies while it is loaded for the first time has FAILED: the load may be what
killed it, and would again. One that was loaded before is tried until the device is given up.
"""

from __future__ import annotations

from enum import StrEnum

from cortex.ipc.node_api import LoadPhase, ModelStatus

FAILED_SHOWN_SECONDS = 600.0


class State(StrEnum):
    """Where a model is."""

    QUEUED = "queued"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    LOADED = "loaded"
    RECOVERING = "recovering"
    UNLOADING = "unloading"
    FAILED = "failed"


class On(StrEnum):
    """What happens to a model."""

    TURN = "turn"
    FETCHED = "fetched"
    LOADED = "loaded"
    FAILED = "failed"
    DEVICE_LOST = "device_lost"
    UNLOAD = "unload"


_ON_THE_WAY = (State.QUEUED, State.DOWNLOADING, State.LOADING)

TRANSITIONS: dict[tuple[State, On], State] = {
    (State.QUEUED, On.TURN): State.DOWNLOADING,
    (State.DOWNLOADING, On.FETCHED): State.LOADING,
    (State.LOADING, On.LOADED): State.LOADED,
    (State.RECOVERING, On.LOADED): State.LOADED,
    **{
        (state, On.FAILED): State.FAILED
        for state in (*_ON_THE_WAY, State.RECOVERING, State.UNLOADING)
    },
    (State.LOADED, On.DEVICE_LOST): State.RECOVERING,
    (State.RECOVERING, On.DEVICE_LOST): State.RECOVERING,
    **{
        (state, On.UNLOAD): State.UNLOADING
        for state in (*_ON_THE_WAY, State.LOADED, State.RECOVERING, State.FAILED)
    },
}

_PHASES: dict[State, LoadPhase] = {
    State.QUEUED: "queued",
    State.DOWNLOADING: "downloading",
    State.LOADING: "loading",
}

_STATUSES: dict[State, ModelStatus] = {
    **dict.fromkeys(_ON_THE_WAY, "loading"),
    State.LOADED: "loaded",
    State.RECOVERING: "recovering",
    State.UNLOADING: "unloading",
    State.FAILED: "failed",
}


def after(state: State, on: On) -> State:
    """Return what *state* becomes; raise ValueError for what cannot happen in it."""
    try:
        return TRANSITIONS[state, on]
    except KeyError:
        raise ValueError(f"{on} cannot happen to a model that is {state}") from None


def public(state: State) -> ModelStatus:
    """Return the status in ``GET /models``."""
    return _STATUSES[state]


def phase(state: State) -> LoadPhase | None:
    """Return the phase of a model that is on its way."""
    return _PHASES.get(state)
