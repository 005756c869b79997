"""The last good reading of every device, kept fresh by one task; looking at them never blocks.

A GPU is asked through its driver. Of a CPU device, what its process holds of its budget is the used
memory; the pages of torch that all processes share are counted in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from cortex.runtime.discovery import Gpu, GpuProbe, Inventory, ProbeFailed, Reading
from cortex.runtime.host import resident_bytes
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

    def of(self, device: DeviceView) -> Reading:
        """Return the last good reading of *device*, empty before the first."""
        return self._last.get(device.spec.name, Reading())

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

    async def keep_fresh(self, every_seconds: float = 1.0) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(every_seconds)

    def _read(self, device: DeviceView, gpu: Gpu | None) -> Reading:
        return _read_cpu(device) if gpu is None else self._probe.read(gpu)


def _read_cpu(device: DeviceView) -> Reading:
    used_bytes = None if device.pid is None else resident_bytes(device.pid)
    if used_bytes is None:
        return Reading()
    return Reading(used_bytes, free_bytes=max(0, device.spec.memory_bytes - used_bytes))
