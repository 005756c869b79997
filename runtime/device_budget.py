"""Which devices to run and what each may take: the configuration meets what the host has. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cortex.ipc.settings import ConfigError
from cortex.runtime.config import DeviceConfig, DeviceSpec, NeuronConfig
from cortex.runtime.discovery import Inventory
from cortex.runtime.host import Host

CPU_MEMORY_SHARE = 0.8
"""Of the host's available memory, what CPU devices may take; the rest is ours and the system's."""
MIB = 2**20


def resolve_devices(config: NeuronConfig, inventory: Inventory, host: Host) -> list[DeviceSpec]:
    """Return the devices to run, indices in order; raise ConfigError for one that cannot.

    CPU devices without numbers of their own share equally what the others leave of the cores and
    the memory. Each has at least one thread, so only a host with fewer cores than CPU devices is
    oversubscribed.
    """
    wanted = _wanted(config, inventory)
    cpus = [device for device in wanted if device.name.startswith("cpu")]
    memory_bytes = _share(
        "memory_mb",
        [device.memory_mb for device in cpus],
        int(host.memory_bytes * CPU_MEMORY_SHARE) // MIB,
    )
    threads = _share("threads", [device.threads for device in cpus], host.cores)
    return [
        _cpu(index, device, memory_bytes, threads)
        if device in cpus
        else _gpu(index, device, inventory)
        for index, device in enumerate(wanted)
    ]


def _wanted(config: NeuronConfig, inventory: Inventory) -> Sequence[DeviceConfig]:
    if config.devices != "auto":
        return config.devices
    return [DeviceConfig(f"cuda:{gpu.index}") for gpu in inventory.gpus] or [DeviceConfig("cpu:0")]


def _share(option: str, asked: list[int | None], available: int) -> int:
    """Return what each device that asked for nothing gets of *available*."""
    taken = sum(number for number in asked if number is not None)
    silent = asked.count(None)
    if taken > available or (silent and len(asked) > silent and taken == available):
        raise ConfigError(
            f"the cpu devices ask for {taken} {option} together"
            f"{' and leave nothing for the others' if silent else ''}; "
            f"this host has {available} to give"
        )
    return max(1, (available - taken) // silent) if silent else 0


def _cpu(index: int, device: DeviceConfig, memory_mb: int, threads: int) -> DeviceSpec:
    return DeviceSpec(
        index=index,
        name=device.name,
        memory_bytes=(device.memory_mb or memory_mb) * MIB,
        threads=device.threads or threads,
    )


def _gpu(index: int, device: DeviceConfig, inventory: Inventory) -> DeviceSpec:
    number = int(device.name.partition(":")[2])
    gpu = next((gpu for gpu in inventory.gpus if gpu.index == number), None)
    if gpu is None:
        seen = inventory.unavailable_reason or f"this host has {len(inventory.gpus)} of them"
        raise ConfigError(f"device {device.name!r} cannot be used: {seen}")
    if device.threads is not None:
        raise ConfigError(f"device {device.name!r}: threads is an option of cpu devices")
    asked = (device.memory_mb or 0) * MIB
    if not asked and not gpu.memory_bytes:
        raise ConfigError(f"device {device.name!r} does not say its memory: give it memory_mb")
    if gpu.memory_bytes and asked > gpu.memory_bytes:
        raise ConfigError(
            f"device {device.name!r} has {gpu.memory_bytes // MIB} MB, not {device.memory_mb}"
        )
    return DeviceSpec(index=index, name=device.name, memory_bytes=asked or gpu.memory_bytes)
