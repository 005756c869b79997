"""The last good reading of every device, kept fresh by one task; looking at them never blocks.

A GPU is asked through its driver. Of a CPU device, what its process holds of its budget is the used
memory; the pages of torch that all processes share are counted in it.

What others take of a device (``foreign_use.py``) is read along, and said in the log when it begins,
changes much and ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from cortex.runtime.discovery import Gpu, GpuProbe, Inventory, ProbeFailed, Reading
from cortex.runtime.foreign_use import ForeignUse, of_cpus, of_gpu
from cortex.runtime.host import Host, counts_all_processes, resident_bytes
from cortex.runtime.node import DeviceView

log = structlog.get_logger()


class Readings:
    """Readings of *devices*; ``keep_fresh`` is their only writer."""

    def __init__(
        self, probe: GpuProbe, inventory: Inventory, devices: Sequence[DeviceView]
    ) -> None:
        self._probe = probe
        self._gpus = {f"cuda:{gpu.index}": gpu for gpu in inventory.gpus}
        self._devices = devices
        self._last: dict[str, Reading] = {}
        self._foreign: dict[str, ForeignUse] = {}
        self._said: dict[str, ForeignUse] = {}
        self._are_pids_known: bool | None = None

    def of(self, device: DeviceView) -> Reading:
        """Return the last good reading of *device*, empty before the first."""
        return self._last.get(device.spec.name, Reading())

    def foreign_use_of(self, device: DeviceView) -> ForeignUse | None:
        """Return what others hold of *device*; None where nobody can say."""
        return self._foreign.get(device.spec.name)

    async def refresh(self) -> None:
        """Read every device once, off the event loop; one that cannot be read keeps its last."""
        for device in self._devices:
            gpu = self._gpus.get(device.spec.name)
            try:
                reading = await asyncio.to_thread(self._read, device, gpu)
            except ProbeFailed as exc:
                log.warning("device not read", device=device.spec.name, error=str(exc))
            else:
                self._last[device.spec.name] = reading
        before = dict(self._foreign)
        await asyncio.to_thread(self._look_for_others)
        self._say_what_changed(before)

    async def keep_fresh(self, every_seconds: float = 1.0) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(every_seconds)

    def _look_for_others(self) -> None:
        cpus = [d for d in self._devices if d.spec.name not in self._gpus]
        if cpus:
            held = [self.of(device).used_bytes or 0 for device in cpus]
            budgets = [device.spec.memory_bytes for device in cpus]
            of_all = of_cpus(sum(budgets), Host.read().memory_bytes, sum(held))
            self._foreign |= {device.spec.name: of_all for device in cpus}
        if self._are_pids_known is None:
            self._are_pids_known = counts_all_processes()
        if self._are_pids_known:
            ours = {device.pid for device in self._devices}
            self._foreign |= {
                device.spec.name: of_gpu(self.of(device).holders, ours)
                for device in self._devices
                if device.spec.name in self._gpus
            }

    def _say_what_changed(self, before: Mapping[str, ForeignUse]) -> None:
        """Log what two looks in a row found: our own process is a stranger while it ends."""
        for name, use in self._foreign.items():
            said = self._said.get(name, ForeignUse())
            if not (use.differs_from(said) and before.get(name, use).differs_from(said)):
                continue
            self._said[name] = use
            if use.is_notable:
                pids = [holder.pid for holder in use.holders]
                log.warning(
                    "others use the memory of a device", device=name, mb=use.held_mb, pids=pids
                )
            else:
                log.info("the memory of a device is its own again", device=name)

    def _read(self, device: DeviceView, gpu: Gpu | None) -> Reading:
        return _read_cpu(device) if gpu is None else self._probe.read(gpu)


def _read_cpu(device: DeviceView) -> Reading:
    used_bytes = None if device.pid is None else resident_bytes(device.pid)
    if used_bytes is None:
        return Reading()
    return Reading(used_bytes, free_bytes=max(0, device.spec.memory_bytes - used_bytes))
