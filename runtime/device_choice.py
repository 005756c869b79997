"""Which device a model is loaded on, or its load is estimated for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.device_process import DeviceProcess


def choose_device(
    request: LoadRequest,
    devices: Sequence[DeviceProcess],
    free_bytes: Callable[[DeviceProcess], int],
) -> DeviceProcess:
    """Return the device asked for, else the ready one with the most free memory, ties by index.

    Where none is ready, one that will be. Raise Unloadable for what no device here can do.
    """
    if request.devices is None:
        return _with_most_memory(devices, free_bytes)
    if not request.devices:
        raise Unloadable("devices is empty: name one, or leave it out", kind="no_such_device")
    asked = request.devices[0]  # of one: preflight refuses more
    for device in devices:
        if device.spec.index == asked:
            _refuse_poisoned(device)
            return device
    there = [device.spec.index for device in devices]
    raise Unloadable(
        f"there is no device {asked}; this neuron has {there}", kind="no_such_device", devices=there
    )


def largest_device(request: LoadRequest, devices: Sequence[DeviceProcess]) -> DeviceProcess:
    """Return the device asked for, else the one with the most memory, taken or not.

    Raise Unloadable as ``choose_device``.
    """
    usable = [device for device in devices if not device.is_poisoned]
    if request.devices is not None or not usable:
        return choose_device(request, devices, lambda device: device.spec.memory_bytes)
    return max(usable, key=lambda device: device.spec.memory_bytes)


def _with_most_memory(
    devices: Sequence[DeviceProcess], free_bytes: Callable[[DeviceProcess], int]
) -> DeviceProcess:
    usable = [device for device in devices if not device.is_poisoned]
    if not usable:
        for device in devices:
            _refuse_poisoned(device)
        raise Unloadable("this neuron has no device", kind="no_such_device")
    return min(
        usable,
        key=lambda device: (not device.is_ready, -free_bytes(device), device.spec.index),
    )


def _refuse_poisoned(device: DeviceProcess) -> None:
    if device.is_poisoned:
        raise Unloadable(
            f"device {device.spec.name} was given up after too many failures: {device.failure}",
            kind="device_poisoned",
        )
