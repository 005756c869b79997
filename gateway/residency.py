"""Whose turn it is to have memory; pure.

Models that somebody waits for are asked about in the order in which their oldest request came, and
each gets one of these answers:

    Start     there is room, or idle models can make it: load it
    Hold      it has to wait; what it waits for is *closing*: once its dwell is over it gets no new
              requests, its running ones end, and then it goes
    Refuse    no waiting helps

What an older model is to get is spoken for, so that a younger one takes neither the memory nor the
victims of it. A model that had to go waits like any other, and has its turn after the dwell of the
one that displaced it: two models that are wanted at the same time swap at most once in a dwell, and
none of any number of models waits for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cortex.gateway.eviction import Resident, Rules
from cortex.gateway.fleet import FleetSnapshot, Place
from cortex.gateway.placement import Candidate, Incoming, candidates
from cortex.gateway.refusal import refusal
from cortex.gateway.room import Claim, Phase, accounted_mb
from cortex.ipc.errors import ApiError


@dataclass(frozen=True)
class Start:
    """Unload the victims of *candidate* and load the model there; *claim* is what it will take."""

    incoming: Incoming
    candidate: Candidate
    claim: Claim


@dataclass(frozen=True)
class Hold:
    """Wait, and look again at *until* if nothing happens before; *why* is for who waits."""

    incoming: Incoming
    why: str
    closing: frozenset[Place] = frozenset()
    until: float | None = None


@dataclass(frozen=True)
class Refuse:
    """Tell everybody who waits."""

    incoming: Incoming
    error: ApiError


Action = Start | Hold | Refuse


def turns(
    snapshot: FleetSnapshot,
    waiting: Iterable[Incoming],
    rules: Rules,
    claims: Collection[Claim] = (),
) -> list[Action]:
    """Return what to do for each model of *waiting*; *claims* are of the loads that run."""
    spoken_for = list(claims)
    actions: list[Action] = []
    for incoming in sorted(waiting, key=lambda i: (i.since, i.node_id)):
        action, claim = _turn(snapshot, incoming, rules, spoken_for)
        actions.append(action)
        if claim is not None:
            spoken_for.append(claim)
    return actions


def _turn(
    snapshot: FleetSnapshot, incoming: Incoming, rules: Rules, claims: Collection[Claim]
) -> tuple[Action, Claim | None]:
    found = candidates(snapshot, incoming, rules, claims)
    best = found[0] if found else None
    if best is None or best.fits in ("no", "away", "never"):
        return Refuse(incoming, refusal(incoming, found)), None
    if best.fits == "after_waiting":
        claim = _claim(incoming, best, "waiting") if best.victims else None
        return _hold(incoming, best, snapshot.now), claim
    claim = _claim(incoming, best, "clearing" if best.victims else "loading")
    return Start(incoming, best, claim), claim


def _claim(incoming: Incoming, best: Candidate, phase: Phase) -> Claim:
    place = (best.node.name, incoming.node_id)
    own_class = incoming.profile.residency_class
    shares_mb = best.wanted_mb if phase == "loading" else best.shares_mb
    return Claim(place, own_class, phase, shares_mb, best.victims, accounted_mb(best.node))


def _hold(incoming: Incoming, best: Candidate, now: float) -> Hold:
    over = [victim for victim in best.victims if victim.hold != "dwell"]
    dwelling = [victim for victim in best.victims if victim.hold == "dwell"]
    return Hold(
        incoming,
        _why(over, dwelling, best, now),
        frozenset(victim.place for victim in over),
        min((victim.free_at for victim in dwelling), default=None),
    )


def _why(
    over: Collection[Resident], dwelling: Collection[Resident], best: Candidate, now: float
) -> str:
    if over:
        names = " and ".join(victim.name for victim in over)
        return f"waiting for {names} to finish on {best.node.name}"
    if dwelling:
        first = min(dwelling, key=lambda victim: victim.free_at)
        seconds = max(1, round(first.free_at - now))
        return f"waiting for the turn of {first.name} on {best.node.name}, {seconds} s more"
    if not best.devices:
        return f"waiting for {best.node.name}: {best.why}"
    return f"waiting for memory of {best.node.name}: others were first"
