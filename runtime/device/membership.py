"""A group that this device has joined: its place, its end of the plan ring, its models.

    rank 0       writes steps into the ring, from the engines of its models (``leader.py``)
    the others   take them out, in order, and have the model that each is for make it

A step of a model that the loader has not handed over yet waits, and everything behind it: its first
rank may have been quicker to answer.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.messages import Event, GroupJoined, ModelLoaded
from cortex.ipc.plan_ring import SLOTS, PlanReader, PlanWriter
from cortex.runtime.device.collectives import RankCollectives
from cortex.runtime.device.follower import Follower
from cortex.runtime.device.plan_wire import ToldStep, decode_step
from cortex.runtime.device.refusal import DeviceLost, PeerLost
from cortex.runtime.device.rendezvous import Place

RING_WAITS_SECONDS = 600.0
"""For a rank that takes no steps, or tells no masks. Its supervisor sees that much earlier."""


class Membership:
    """The main thread's side of one group."""

    def __init__(self, place: Place, descriptors: Sequence[Descriptor]) -> None:
        """*descriptors* are those of this rank's end of the plan ring."""
        self.place = place
        self._writer = PlanWriter(descriptors) if place.rank == 0 else None
        self._reader = PlanReader(descriptors) if place.rank else None
        self._followers: dict[str, Follower] = {}
        self._told: ToldStep | None = None

    @property
    def fds(self) -> list[int]:
        """Readable when ``follow`` has something to do, once it has said that there is nothing."""
        return [self._reader.fileno()] if self._reader and self._told is None else []

    def add(self, follower: Follower) -> None:
        """Let a model follow from now on."""
        self._followers[follower.model] = follower

    def remove(self, model: str, loading: Container[str]) -> bool:
        """Make the steps that were told, and forget *model*, of which no more come.

        Return False where a step has to wait for one that is *loading*: nothing is forgotten then.
        """
        for _ in range(1 + SLOTS):  # no more can wait; the other models are told new ones meanwhile
            if not self.follow(loading):
                break
        if self._told is not None:
            return False
        self._followers.pop(model, None)
        return True

    def broadcast(self, message: bytes) -> None:
        """Write for all other ranks; raise PlanRingFull.

        A full ring is waited for without a beat: a rank that reads nothing for so long hangs, and
        this one is part of it.
        """
        assert self._writer is not None, "only the first rank tells steps"
        self._writer.broadcast(message, RING_WAITS_SECONDS)

    def follow(self, loading: Container[str]) -> bool:
        """Make the next step that was told; return whether there was one.

        Raise DeviceLost where it fails, or is one of a model that is neither here nor *loading*.
        """
        told = self._next()
        if told is None:
            return False
        follower = self._followers.get(told.model)
        if follower is None and told.model in loading:
            return False
        if follower is None:
            raise DeviceLost(f"the first rank told a step of {told.model}, which is not here")
        self._told = None
        follower.step(told, self._next_message)
        return True

    def close(self) -> None:
        """Give up the end of the ring."""
        for end in (self._writer, self._reader):
            if end is not None:
                end.close()

    def _next(self) -> ToldStep | None:
        if self._told is None and self._reader is not None:
            message = self._reader.take()
            self._told = decode_step(message) if message is not None else None
        return self._told

    def _next_message(self) -> bytes:
        assert self._reader is not None, "only those who follow are told"
        message = self._reader.take(RING_WAITS_SECONDS)
        if message is None:
            raise PeerLost("the first rank did not tell what its grammars allow")
        return message


@dataclass(frozen=True, slots=True)
class Share:
    """What a loaded model has of its group."""

    membership: Membership
    collectives: RankCollectives


@dataclass(frozen=True, slots=True)
class FollowerLoaded:
    """A model that is ready to follow, and what to tell the supervisor."""

    follower: Follower
    event: ModelLoaded
    share: Share


@dataclass(frozen=True, slots=True)
class Joined:
    """A group whose ranks have all met, and what to tell the supervisor."""

    membership: Membership
    event: GroupJoined


@dataclass(frozen=True, slots=True)
class Answered:
    """Only something to tell the supervisor."""

    event: Event
