"""A supervisor with everything behind it doubled, for its tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial

from cortex.ipc.errors import ApiError
from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.taps import Tap
from cortex.runtime.config import DeviceSpec
from cortex.runtime.model_state import State
from cortex.runtime.served_model import ServedModel
from cortex.runtime.supervisor import Supervisor
from supervisor_fakes import MIB, FakeClock, FakeDevices, FakeModelFiles, eventually

A, B = "file:/models/a.gguf", "file:/models/b.gguf"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1)


class Neuron:
    """The supervisor of CPU devices with a gigabyte each, and the doubles behind it."""

    def __init__(self, devices: int = 2) -> None:
        self.lives = FakeDevices()
        self.files = FakeModelFiles()
        self.clock = FakeClock()
        self.under_way: list[asyncio.Future[object]] = []
        """What a test has begun and will wait for in the end."""
        self.supervisor = Supervisor(
            [DeviceSpec(index, f"cpu:{index}", 1024 * MIB, 1) for index in range(devices)],
            taps=Tap(None, "supervisor"),
            clock=self.clock,
            begin_life=self.lives.begin,
            backoff=lambda _: 0.0,
            files=self.files,
        )

    async def loads(self, model_id: str = A, device: int | None = 0) -> ServedModel:
        devices = None if device is None else [device]
        await self.supervisor.load(LoadRequest(model_id, devices=devices))
        return await self.supervisor.loaded(model_id)

    async def reaches(self, model_id: str, state: State) -> None:
        await eventually(lambda: self.supervisor.models[model_id].state is state, state)

    async def dies(self, device: int = 0, times: int = 1) -> None:
        """Let a device die, each time as soon as it is ready again."""
        for _ in range(times):
            lives = len(self.lives.lives[device])
            await self.supervisor.devices[device].become_ready()
            self.lives.now(device).dies()
            await eventually(partial(self._has_died, device, lives), "the death")

    def _has_died(self, device: int, lives: int) -> bool:
        has_another = len(self.lives.lives[device]) > lives
        return has_another or self.supervisor.devices[device].is_poisoned


async def error_of(waiting: Awaitable[object]) -> ApiError | None:
    """Return what *waiting* raises."""
    try:
        await waiting
    except ApiError as exc:
        return exc
    return None
