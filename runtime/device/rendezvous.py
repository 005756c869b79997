"""How the ranks of a group meet and come to an agreement, in a store that all of them see.

    join      every rank says that it is there, and waits for all others
    check     one communicator, one sum
    load      begin    all ranks are about to load it, so a communicator of its own can be made
              met      it is made, and may be given up again
              limits   what would fit here; everybody takes the least of all
              ready    cache and graphs are there; it can step

The store is a file in the directory that the supervisor made for the group (torch's FileStore): no
port to choose, none to be found by anybody else. What a rank says at a stage is one key, and a rank
that cannot go on says so under another, which all others see while they wait and while they read
weights: a load that is refused on one rank is refused on all, by the same words and numbers.

All of this waits, so it belongs on the loader thread, which beats meanwhile: a rank that still
reads its weights is no hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import msgspec
import torch
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined] # torch's

from cortex.ipc.messages import PEER_LOST, Failed
from cortex.models.parallel import Group
from cortex.runtime.device.collectives import (
    Communicator,
    RankCollectives,
    backend_of,
    communicator,
)
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.refusal import PeerLost, Refused

MEET_SECONDS = 120.0
"""All ranks are sent a command at the same time; one that does not come is gone, or hangs."""
LOAD_SECONDS = 1800.0
"""For the slowest rank's weights."""
LOOK_SECONDS = 0.01


class RefusedElsewhere(Refused):
    """Another rank cannot go on."""


class Place:
    """A device's place in a group: which rank it is, and where it meets the others."""

    def __init__(
        self,
        name: str,
        rank: int,
        ranks: int,
        *,
        meeting: Path,
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*beat* is called while it waits. Raise Refused where there is no *meeting*."""
        if not meeting.is_dir():  # the store would wait for it
            raise Refused("group_failed", f"{meeting} is no directory to meet in")
        self.name = name
        self.rank = rank
        self.ranks = ranks
        self.device = device
        self.backend = backend_of(device)
        self._beat = beat
        self._clock = clock
        self._store = FileStore(str(meeting / "store"), ranks)
        self._store.set_timeout(timedelta(seconds=MEET_SECONDS))
        self._meetings = count()

    def join(self) -> None:
        """Wait for all ranks; raise Refused where one does not come."""
        self._talk("join").exchange("here", b"", MEET_SECONDS)

    def checked_sum(self) -> float:
        """Return what rank + 1 adds up to over all ranks."""
        talk = self._talk(f"check.{next(self._meetings)}")
        collectives = self.meet(talk)
        number = torch.full((1, 1), self.rank + 1.0, device=self.device)
        observed = float(collectives.all_reduce(number))
        talk.exchange("added", b"", MEET_SECONDS)
        collectives.close()
        return observed

    def begin_load(self) -> SharedLoad:
        """Return the next load of the group, which every rank has to begin."""
        return SharedLoad(self, self._talk(f"load.{next(self._meetings)}"))

    def meet(self, talk: Talk) -> Communicator:
        """Return a new communicator of all ranks; raise Refused where one does not come."""
        talk.exchange("begin", b"", MEET_SECONDS)
        try:
            made = communicator(
                talk.store("meet"), self.device, self.rank, self.ranks, MEET_SECONDS
            )
        except PeerLost as exc:
            raise Refused(PEER_LOST, str(exc)) from exc
        talk.exchange("met", b"", MEET_SECONDS)  # before one gives it up, and others cannot connect
        return made

    def _talk(self, name: str) -> Talk:
        return Talk(PrefixStore(name, self._store), self.rank, self.ranks, self._beat, self._clock)


class Talk:
    """What the ranks say to each other about one thing, stage by stage."""

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        beat: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(ranks) if other != rank]
        self._beat = beat
        self._clock = clock

    def store(self, name: str) -> Store:
        """Return a part of the store that nothing else uses."""
        return PrefixStore(name, self._store)

    def exchange(self, stage: str, said: bytes, wait_seconds: float) -> list[bytes]:
        """Say something, and return what all ranks said, in their order.

        Raise RefusedElsewhere where one of them has given up, Refused where one does not come.
        """
        self._store.set(f"{stage}.{self._rank}", said.hex())
        until = self._clock() + wait_seconds
        answers = {self._rank: said}
        for other in self._others:
            key = f"{stage}.{other}"
            while not self._store.check([key]):
                self.look()
                if self._clock() > until:
                    raise Refused(PEER_LOST, f"rank {other} did not come in {wait_seconds:g} s")
                self._beat()
                time.sleep(LOOK_SECONDS)
            answers[other] = bytes.fromhex(self._store.get(key).decode())
        return [answers[rank] for rank in sorted(answers)]

    def give_up(self, failed: Failed) -> None:
        """Let the others know that this rank does not go on."""
        self._store.set(f"refused.{self._rank}", msgspec.json.encode(failed).decode())

    def look(self) -> None:
        """Raise RefusedElsewhere where another rank has given up."""
        for other in self._others:
            key = f"refused.{other}"
            if self._store.check([key]):
                told = msgspec.json.decode(self._store.get(key), type=Failed)
                raise RefusedElsewhere(told.code, f"on rank {other}: {told.detail}", **told.numbers)


class SharedLoad:
    """One load, as the ranks go through it together; each stage raises Refused, and PeerLost."""

    def __init__(self, place: Place, talk: Talk) -> None:
        self._place = place
        self._talk = talk
        self._collectives: RankCollectives | None = None

    def begin(self) -> Group:
        """Meet the others; return the rank whose part is to be loaded, its collectives mute."""
        place = self._place
        made = place.meet(self._talk)
        self._collectives = RankCollectives(made, place.ranks)
        return Group(place.rank, place.ranks, self._collectives)

    def look(self) -> None:
        """Raise RefusedElsewhere where another rank has given up meanwhile."""
        self._talk.look()

    def agree(self, limits: Limits) -> Limits:
        """Return the least of the *limits* of all ranks, with this one's workspace."""
        said = self._talk.exchange("limits", msgspec.json.encode(limits), LOAD_SECONDS)
        return least([msgspec.json.decode(one, type=Limits) for one in said], limits)

    def be_ready(self) -> RankCollectives:
        """Wait until the model can step on all ranks; return its collectives, which mean it now."""
        assert self._collectives is not None, "the load has begun"
        self._talk.exchange("ready", b"", LOAD_SECONDS)
        self._collectives.speak()
        return self._collectives

    def give_up(self, failed: Failed | None) -> None:
        """End it; let the others know why, unless it was them."""
        if failed is not None:
            self._talk.give_up(failed)
        if self._collectives is not None:
            self._collectives.close()


def least(of_all: list[Limits], own: Limits) -> Limits:
    """Return the least of every limit but the workspace, which is a rank's *own*."""
    agreed = {
        field.name: min(getattr(limits, field.name) for limits in of_all)
        for field in fields(Limits)
        if field.name != "workspace_bytes"
    }
    return replace(own, **agreed)
