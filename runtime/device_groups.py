"""The tensor-parallel groups of a node: devices that have met, and know that they add up.

    made        a plan ring, whose ends go to the ranks by their posts (``ipc/post.py``)
    joined      JoinGroup to all ranks at once: each answers once all have come
    checked     CheckCollective to all at once: the sum of their numbers has to be right
    gone        a rank was lost, or another group needs one of its devices

A group is made when a model first needs it, and serves every model on the same devices after that.
Whoever joins holds the turns of all its devices (``model_loads.py``), so nothing of this happens to
a device twice at a time. Of a group that models use, the loss of one rank ends the others at once:
they wait for it in the middle of a step, and could not be told otherwise.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import structlog

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.errors import NodeFailed, PeerGone, Recovering, Unloadable
from cortex.ipc.messages import (
    PEER_LOST,
    CheckCollective,
    CollectiveChecked,
    Command,
    Event,
    GroupJoined,
    JoinGroup,
    LeaveGroup,
)
from cortex.ipc.plan_ring import PlanRing
from cortex.runtime.device_conversation import Progress, Refused
from cortex.runtime.device_process import DeviceProcess

JOIN_TIMEOUT_SECONDS = 180.0
"""Longer than the ranks wait for each other; one that says nothing by then is killed."""

Members = tuple[DeviceProcess, ...]
Question = Callable[[int, int], Command]
"""Of a rank, and a command id."""
RankProgress = Callable[[int, int, int], None]
"""Of a rank, its bytes done and its bytes in total."""
_log = structlog.get_logger()


class DeviceGroups:
    """The groups of a node, no two of which share a device."""

    def __init__(self) -> None:
        self._names: dict[Members, str] = {}
        """Of those that are joined, or just being joined."""
        self._numbers = itertools.count(1)
        self._meetings: Path | None = None
        self._lock: Descriptor | None = None

    async def join(self, devices: Sequence[DeviceProcess]) -> str:
        """Return the name of the group of *devices*, which is made now if it is not there.

        Raise Refused, PeerGone or Unloadable where they do not find together.
        """
        members = tuple(devices)
        if members in self._names:
            return self._names[members]
        for other in [other for other in self._names if not set(other).isdisjoint(members)]:
            self._leave(other)
        indices = "-".join(str(device.spec.index) for device in members)
        name = self._names[members] = f"{indices}.{next(self._numbers)}"
        try:
            await self._make(members, name)
        except BaseException:
            self._leave(members)
            raise
        return name

    def lost(self, device: DeviceProcess, *, is_used: bool) -> None:
        """Forget the group of *device*, which is lost; end the others of one that *is_used*."""
        members = next((members for members in self._names if device in members), None)
        if members is None:
            return
        if not is_used:
            self._leave(members)
            return
        del self._names[members]
        for other in members:
            if other is not device:
                other.end_with(device.spec.name)

    def close(self) -> None:
        """Remove what the ranks have met in; blocks."""
        if self._meetings is not None:
            shutil.rmtree(self._meetings, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    async def _make(self, members: Members, name: str) -> None:
        meeting = await asyncio.to_thread(self._new_meeting, name)
        ring = PlanRing(len(members) - 1)
        try:
            for rank, device in enumerate(members):
                device.send_descriptors(name, ring.descriptors(rank))
        finally:
            ring.close()
        joined = await ask_all(
            members,
            lambda rank, command_id: JoinGroup(command_id, name, rank, len(members), str(meeting)),
            timeout_seconds=JOIN_TIMEOUT_SECONDS,
        )
        raise_error(joined)
        checked = await ask_all(
            members,
            lambda _, command_id: CheckCollective(command_id, name),
            timeout_seconds=JOIN_TIMEOUT_SECONDS,
        )
        raise_error(checked)
        _refuse_wrong_sum(members, checked)
        backend = joined[0].backend if isinstance(joined[0], GroupJoined) else None
        devices = [device.spec.name for device in members]
        _log.info("devices joined", group=name, devices=devices, backend=backend)

    def _leave(self, members: Members) -> None:
        name = self._names.pop(members, None)
        if name is None:  # a rank was lost meanwhile
            return
        for device in members:
            device.tell(lambda command_id: LeaveGroup(command_id, name))

    def _new_meeting(self, name: str) -> Path:
        """Return an empty directory, and empty those of groups that are gone."""
        if self._meetings is None or not self._meetings.is_dir():
            self._meetings = self._new_meetings()
        for old in self._meetings.iterdir():
            if old.name not in self._names.values():
                _empty(old)
        meeting = self._meetings / name
        meeting.mkdir()
        return meeting

    def _new_meetings(self) -> Path:
        """Return a new directory that no cleaner of old files takes while we live.

        A group meets there again for each of its models, maybe weeks later. systemd-tmpfiles leaves
        a directory alone that somebody has locked, and what is in it.
        """
        meetings = Path(tempfile.mkdtemp(prefix="neuron-groups-"))
        if self._lock is not None:
            self._lock.close()
        self._lock = Descriptor(os.open(meetings, os.O_RDONLY | os.O_DIRECTORY))
        fcntl.flock(self._lock.fd, fcntl.LOCK_EX)
        return meetings


def _empty(meeting: Path) -> None:
    """Remove the files of a group that is gone, and leave their directory.

    A rank that is just leaving opens torch's FileStore a last time to close it: a file that is gone
    it makes anew, for a directory it waits as long as the store's timeout, and then it aborts.
    """
    for file in meeting.iterdir():
        file.unlink(missing_ok=True)


async def ask_all(
    devices: Sequence[DeviceProcess],
    question: Question,
    *,
    timeout_seconds: float,
    progress: RankProgress | None = None,
) -> list[Event | BaseException]:
    """Ask every rank at the same time; return what each answers, or what came instead."""
    return await asyncio.gather(
        *(
            _ask(
                device,
                partial(question, rank),
                timeout_seconds,
                None if progress is None else partial(progress, rank),
            )
            for rank, device in enumerate(devices)
        ),
        return_exceptions=True,
    )


def raise_error(answers: Sequence[Event | BaseException]) -> None:
    """Raise what a rank answered instead of the right thing, of several what says most."""
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if errors:
        raise min(errors, key=_says_little)


def _says_little(error: BaseException) -> int:
    """A bug comes first, then a lost rank, and last that others have failed."""
    if isinstance(error, PeerGone):
        return 1
    if isinstance(error, Refused):
        return 3 if error.failed.code == PEER_LOST else 2
    return 0


async def _ask(
    device: DeviceProcess,
    question: Callable[[int], Command],
    timeout_seconds: float,
    progress: Progress | None,
) -> Event:
    try:
        return await device.ask(question, timeout_seconds=timeout_seconds, progress=progress)
    except (Recovering, NodeFailed) as exc:  # it was lost before it could be asked
        raise PeerGone(str(exc)) from exc


def _refuse_wrong_sum(members: Members, checked: Sequence[Event | BaseException]) -> None:
    right = len(members) * (len(members) + 1) / 2
    sums = [answer.observed_sum for answer in checked if isinstance(answer, CollectiveChecked)]
    if sums != [right] * len(members):
        names = " and ".join(device.spec.name for device in members)
        raise Unloadable(
            f"{names} cannot share a model: their ranks add up to {sums}, not to {right} each",
            kind="collective_failed",
        )
