"""The states of a device, as a table; ``device_process.py`` acts on it and is its only writer.

    device                 on              becomes      does
    STARTING, RESTARTING   HELLO           READY        load again what should be loaded
    any that runs          LOST            RESTARTING   fail its sequences, fork after a back-off
    any that runs          LOST_TOO_OFTEN  POISONED     its models become unservable
    any that runs,
    POISONED               RESTART         RESTARTING   kill it if it runs, fork again at once
    any but STOPPED        STOP            STOPPING     Shutdown, grace, SIGKILL
    STOPPING               LOST            STOPPED      nothing is left of it

"Any that runs" is STARTING, READY and RESTARTING; RESTARTING covers the back-off and the time to
Hello. LOST is the process gone, or one that could not be started, did not say Hello in time or said
a wrong one. The fourth in ten minutes is LOST_TOO_OFTEN. A restart that an operator asked for
counts as no failure and forgets the earlier ones. One that was ended with another rank of its
tensor-parallel group waits like the others, but has not failed: a healthy card is not given up for
its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from cortex.ipc import node_api

FAILURES_TO_POISON = 4
FAILURE_WINDOW_SECONDS = 600.0
BACKOFF_SECONDS = (0.1, 1.0, 10.0)
"""Before the restart after the first, second and third failure of the window: the first comes back
at once, the third leaves a driver time to reset."""


class State(StrEnum):
    """Where a device is; the public name of STOPPING is stopped."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    POISONED = "poisoned"
    STOPPING = "stopping"
    STOPPED = "stopped"


class On(StrEnum):
    """What happens to a device."""

    HELLO = "hello"
    LOST = "lost"
    LOST_TOO_OFTEN = "lost_too_often"
    RESTART = "restart"
    STOP = "stop"


class Cause(StrEnum):
    """Why a life ended, as ``/health`` and the metrics count it."""

    DIED = "died"
    """The process ended by itself: a signal, an exit."""
    FAILED = "failed"
    """It said that it cannot go on."""
    HUNG = "hung"
    """It was killed for doing nothing, or one thing, for too long."""
    PROTOCOL = "protocol"
    """It said something that cannot be."""
    NOT_STARTED = "not_started"
    """There never was a process."""
    PEER = "peer"
    """Another rank of its tensor-parallel group was lost."""
    ASKED = "asked"
    """An operator wanted a restart, or the neuron stops."""


_RUNS = (State.STARTING, State.READY, State.RESTARTING)

TRANSITIONS: dict[tuple[State, On], State] = {
    (State.STARTING, On.HELLO): State.READY,
    (State.RESTARTING, On.HELLO): State.READY,
    **{(state, On.LOST): State.RESTARTING for state in _RUNS},
    **{(state, On.LOST_TOO_OFTEN): State.POISONED for state in _RUNS},
    **{(state, On.RESTART): State.RESTARTING for state in (*_RUNS, State.POISONED)},
    **{(state, On.STOP): State.STOPPING for state in (*_RUNS, State.POISONED, State.STOPPING)},
    (State.STOPPING, On.HELLO): State.STOPPING,
    (State.STOPPING, On.LOST): State.STOPPED,
}

_PUBLIC: dict[State, node_api.DeviceState] = {
    State.STARTING: "starting",
    State.READY: "ready",
    State.RESTARTING: "restarting",
    State.POISONED: "poisoned",
    State.STOPPING: "stopped",
    State.STOPPED: "stopped",
}


def after(state: State, on: On) -> State:
    """Return what *state* becomes; raise ValueError for what cannot happen in it."""
    try:
        return TRANSITIONS[state, on]
    except KeyError:
        raise ValueError(f"{on} cannot happen to a device that is {state}") from None


def public(state: State) -> node_api.DeviceState:
    """Return the state's name in ``/health``."""
    return _PUBLIC[state]


def recent(failures: Sequence[float], now: float) -> list[float]:
    """Return those of the *failures* (clock readings, seconds) that still count."""
    return [at for at in failures if now - at < FAILURE_WINDOW_SECONDS]


def loss(failures: Sequence[float]) -> On:
    """Return what a loss is, given the *failures* that count, itself included."""
    return On.LOST_TOO_OFTEN if len(failures) >= FAILURES_TO_POISON else On.LOST


def backoff_seconds(failures: int) -> float:
    """Return how long to wait before the restart after that many losses in the window."""
    return BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
