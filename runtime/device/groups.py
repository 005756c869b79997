"""The groups that this device is a rank of, and its models that are spread over them.

    main thread                        loader thread
    obey(JoinGroup)       ── job ──►   wait for the other ranks in the store (``rendezvous.py``)
    joined(...)           ◄──────────
    obey(CheckCollective) ── job ──►   meet once more, add up
    loads of a group                   meet, measure, agree
    follow()                           -

What waits for other ranks does so beside the steps of this device's models. The plan ring's
descriptors have come by post when JoinGroup does.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

import torch

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.heartbeat import Activity
from cortex.ipc.messages import (
    CheckCollective,
    CollectiveChecked,
    Event,
    Failed,
    GroupJoined,
    GroupLeft,
    JoinGroup,
    LeaveGroup,
)
from cortex.ipc.post import Letters
from cortex.runtime.device.follower import Follower
from cortex.runtime.device.loader import Loader
from cortex.runtime.device.membership import Answered, Joined, Membership, Share
from cortex.runtime.device.refusal import DeviceLost, Refused
from cortex.runtime.device.rendezvous import Place

GroupCommand = JoinGroup | CheckCollective | LeaveGroup


class Groups:
    """The main thread's view of all of them."""

    def __init__(
        self,
        device: torch.device,
        letters: Letters | None,
        loader: Loader,
        send: Callable[[Event], None],
    ) -> None:
        """Without *letters* no group can be joined."""
        self._device = device
        self._letters = letters
        self._loader = loader
        self._send = send
        self._memberships: dict[str, Membership] = {}
        self._shares: dict[str, Share] = {}

    @property
    def fds(self) -> list[int]:
        """Readable when ``follow`` has something to do."""
        return [fd for membership in self._memberships.values() for fd in membership.fds]

    def obey(self, command: GroupCommand) -> None:
        """Begin what the loader thread then answers, or leave a group; raise Refused."""
        match command:
            case JoinGroup():
                descriptors = self._letters.take(command.group) if self._letters else None
                if descriptors is None:
                    raise Refused("group_failed", f"no plan ring came for group {command.group}")
                self._loader.do(partial(self._join, command, descriptors))
            case CheckCollective():
                self._loader.do(partial(_check, command, self.membership(command.group).place))
            case LeaveGroup():
                self._leave(command.group)
                self._send(GroupLeft(command.command_id, command.group))

    def joined(self, joined: Joined) -> None:
        """Take over a group whose ranks have met."""
        self._memberships[joined.membership.place.name] = joined.membership
        self._send(joined.event)

    def membership(self, group: str) -> Membership:
        """Return this device's part in *group*; raise Refused where it has none."""
        if group not in self._memberships:
            raise Refused("group_failed", f"this device has not joined a group {group}")
        return self._memberships[group]

    def __contains__(self, model: str) -> bool:
        return model in self._shares

    def add(self, model: str, share: Share, follower: Follower | None = None) -> None:
        """Take over a model that is loaded on all ranks; where this one leads nothing follows."""
        self._shares[model] = share
        if follower is not None:
            share.membership.add(follower)

    def follows(self, model: str) -> bool:
        """Whether *model* makes the steps that another rank tells."""
        return model in self._shares and self._shares[model].membership.place.rank > 0

    def drain(self, model: str, loading: Container[str]) -> bool:
        """Make the steps that were told, and let *model* follow no more; see ``Membership``."""
        return self._shares[model].membership.remove(model, loading)

    def forget(self, model: str) -> None:
        """Give up what the ranks of *model* had together, if it was spread over any."""
        share = self._shares.pop(model, None)
        if share is not None:
            share.collectives.close()

    def follow(self, loading: Container[str]) -> bool:
        """Make the next step that each first rank told; return whether there was any.

        One of a model that is still *loading* waits.
        """
        return any(membership.follow(loading) for membership in self._memberships.values())

    def _join(self, command: JoinGroup, descriptors: list[Descriptor]) -> Joined | Answered:
        try:
            place = Place(
                command.group,
                command.rank,
                command.ranks,
                meeting=Path(command.meeting),
                device=self._device,
                beat=partial(self._loader.beat, Activity.LOADING),
            )
            place.join()
        except (Refused, RuntimeError) as exc:  # the second: the store cannot be opened
            for descriptor in descriptors:
                descriptor.close()
            return _failed(command, exc)
        event = GroupJoined(command.command_id, command.group, place.backend)
        return Joined(Membership(place, descriptors), event)

    def _leave(self, group: str) -> None:
        membership = self._memberships.get(group)
        if any(share.membership is membership for share in self._shares.values()):
            raise Refused("group_failed", f"models of group {group} are loaded")
        if membership is not None:
            del self._memberships[group]
            membership.close()


def _check(command: CheckCollective, place: Place) -> Answered:
    try:
        observed = place.checked_sum()
    except (Refused, DeviceLost) as exc:
        return _failed(command, exc)
    return Answered(CollectiveChecked(command.command_id, command.group, observed))


def _failed(command: GroupCommand, error: Exception) -> Answered:
    code = error.code if isinstance(error, Refused | DeviceLost) else "group_failed"
    return Answered(Failed(code, str(error), command.command_id))
