"""Which devices a model is loaded on, or its load is estimated for. Pure.

Devices that share a model are a group; the lowest index leads it. A device is in one group at most:
groups that share a device are equal, so a model either joins a group that is there, or takes
devices that are in none. They are of one kind, because others have no way to add up together.

    kind               what is wrong
    no_such_device     it was asked for, and this neuron has not got it
    device_poisoned    it was given up
    devices_mismatch   devices of two kinds
    too_few_devices    this neuron has not so many of one kind
    groups_overlap     some of them are in another group, which models use
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol, TypeVar

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.config import DeviceSpec

Group = tuple[int, ...]
"""The indices of devices that share models, in order."""


class Choosable(Protocol):
    """A device, as far as a choice looks at it."""

    @property
    def spec(self) -> DeviceSpec:
        """Its index, name and budget."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes commands now."""

    @property
    def is_poisoned(self) -> bool:
        """Whether it was given up."""

    @property
    def failure(self) -> str | None:
        """Why it was lost the last time."""


D = TypeVar("D", bound=Choosable)
Order = Callable[[Sequence[D]], tuple[object, ...]]
"""Which of several groups, or of several devices, is taken: the least."""


def choose_devices(
    request: LoadRequest,
    devices: Sequence[D],
    free_bytes: Callable[[D], int],
    groups: Collection[Group] = (),
) -> list[D]:
    """Return the devices asked for, else ready ones with the most free memory, ties by index.

    Where none are ready, ones that will be. *groups* are those that models use. Raise Unloadable
    for what no device here can do.
    """

    def order(group: Sequence[D]) -> tuple[object, ...]:
        is_ready = all(device.is_ready for device in group)
        return not is_ready, -min(map(free_bytes, group)), _indices(group)

    return _choose(request, devices, order, groups)


def largest_devices(request: LoadRequest, devices: Sequence[D]) -> list[D]:
    """Return the devices asked for, else those with the most memory, taken or not.

    Raise Unloadable as ``choose_devices``.
    """

    def order(group: Sequence[D]) -> tuple[object, ...]:
        return -min(device.spec.memory_bytes for device in group), _indices(group)

    return _choose(request, devices, order, ())


def _choose(
    request: LoadRequest,
    devices: Sequence[D],
    order: Order[D],
    groups: Collection[Group],
) -> list[D]:
    if request.devices is not None:
        chosen = _asked(request.devices, devices)
        _refuse_overlap(chosen, groups)
        return chosen
    usable = [device for device in devices if not device.is_poisoned]
    _refuse_too_few(request.ranks, devices, usable)
    candidates = list(_candidates(request.ranks, usable, order, groups))
    if not candidates:
        raise _overlap(f"{request.ranks} devices", groups)
    return min(candidates, key=order)


def _asked(asked: Sequence[int], devices: Sequence[D]) -> list[D]:
    by_index = {device.spec.index: device for device in devices}
    missing = [index for index in asked if index not in by_index]
    if missing:
        raise Unloadable(
            f"there is no device {missing[0]}; this neuron has {list(by_index)}",
            kind="no_such_device",
            devices=list(by_index),
        )
    chosen = [by_index[index] for index in sorted(asked)]
    for device in chosen:
        _refuse_poisoned(device)
    if len({device.spec.kind for device in chosen}) > 1:
        names = " and ".join(device.spec.name for device in chosen)
        raise Unloadable(
            f"{names} cannot share a model: they are of several kinds", kind="devices_mismatch"
        )
    return chosen


def _candidates(
    ranks: int,
    devices: Sequence[D],
    order: Order[D],
    groups: Collection[Group],
) -> Iterator[list[D]]:
    """Yield the best new group of each kind of device, and those that are there already."""
    taken = {index for group in groups for index in group} if ranks > 1 else set[int]()
    for kind in sorted({device.spec.kind for device in devices}):
        free = [d for d in devices if d.spec.kind == kind and d.spec.index not in taken]
        free.sort(key=lambda device: order([device]))
        if len(free) >= ranks:
            yield sorted(free[:ranks], key=lambda device: device.spec.index)
    for group in sorted(set(groups)):
        members = [device for device in devices if device.spec.index in group]
        if len(members) == len(group) == ranks:
            yield members


def _indices(group: Sequence[Choosable]) -> Group:
    return tuple(device.spec.index for device in group)


def _refuse_overlap(chosen: Sequence[Choosable], groups: Collection[Group]) -> None:
    asked = _indices(chosen)
    if len(asked) > 1 and any(asked != group and set(asked) & set(group) for group in groups):
        raise _overlap(f"devices {list(asked)}", groups)


def _overlap(what: str, groups: Collection[Group]) -> Unloadable:
    there = sorted(set(groups))
    return Unloadable(
        f"{what} cannot be a group of their own: models share the devices "
        f"{' and '.join(str(list(group)) for group in there)}, and a device is in one group only; "
        "use one of these, or unload what is there",
        kind="groups_overlap",
        groups=[list(group) for group in there],
    )


def _refuse_too_few(ranks: int, devices: Sequence[Choosable], usable: Sequence[Choosable]) -> None:
    if not devices:
        raise Unloadable("this neuron has no device", kind="no_such_device")
    if _most_alike(usable) >= ranks:
        return
    if _most_alike(devices) >= ranks:
        for device in devices:
            _refuse_poisoned(device)
    raise Unloadable(
        f"the model is to be shared by {ranks} devices, and this neuron has "
        f"{_most_alike(devices)} of one kind",
        kind="too_few_devices",
        requested=ranks,
        available=_most_alike(devices),
    )


def _most_alike(devices: Sequence[Choosable]) -> int:
    kinds = [device.spec.kind for device in devices]
    return max((kinds.count(kind) for kind in set(kinds)), default=0)


def _refuse_poisoned(device: Choosable) -> None:
    if device.is_poisoned:
        raise Unloadable(
            f"device {device.spec.name} was given up after too many failures: {device.failure}",
            kind="device_poisoned",
        )
