"""What is left of each device's memory: the books that loads are placed and judged by. Pure.

    room          the budget, less what models hold, less what others hold (``foreign_use.py``)
    free          the room, less what the loads on their way are expected to take

A load is judged by the room, which is fact, and placed by what is free: so two loads that arrive
together do not both choose the device that has the most. One of which nobody knows the size is
expected to take half of what is free when it comes. A model on several devices has its share booked
on each; what it may take of each is the room of the fullest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cortex.runtime.device_process import DeviceProcess
from cortex.runtime.foreign_use import ForeignUse
from cortex.runtime.model_state import phase
from cortex.runtime.served_model import ServedModel


class MemoryBooks:
    """The books over *models*, which is the supervisor's own table."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.foreign_use: Callable[[DeviceProcess], ForeignUse | None] = lambda _: None
        """Who reads the devices sets it."""
        self._models = models

    def room_bytes(self, device: DeviceProcess) -> int:
        """Return what models may take that are not on the device yet."""
        held = sum(model.held_bytes(device) for model in self._models.values())
        foreign = self.foreign_use(device)
        taken = 0 if foreign is None else foreign.held_bytes
        return max(0, device.spec.memory_bytes - held - taken)

    def least_room(self, devices: Sequence[DeviceProcess]) -> DeviceProcess:
        """Return the one of *devices* that has the least room: a model's shares are alike."""
        return min(devices, key=self.room_bytes)

    def free_bytes(self, device: DeviceProcess) -> int:
        """Return what will be left once the loads on their way have ended."""
        left = self.room_bytes(device)
        for model in self._models.values():
            if device in model.devices and phase(model.state) is not None:
                estimate = left // 2 if model.estimate_bytes is None else model.estimate_bytes
                left -= min(estimate, left)
        return left

    def foreign_words(self, device: DeviceProcess) -> str:
        """Return what a refusal for want of memory adds about others, maybe nothing."""
        foreign = self.foreign_use(device)
        return "" if foreign is None else foreign.words
