"""A supervisor of two real device processes in which ordered things go wrong.

Model A is on cpu:0, where the faults are, model B on cpu:1. Both recall what they were told
(``engine_fakes.py``), so one can tell whether a stream lost a token.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import AsyncIterator
from functools import partial

import pytest

import faulty_child
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.ring import Flag
from cortex.ipc.taps import Tap
from cortex.runtime import supervisor as supervisor_module
from cortex.runtime.config import DeviceSpec
from cortex.runtime.fork_server import ForkServer
from cortex.runtime.generation import Generation
from cortex.runtime.hang_watch import Deadlines
from cortex.runtime.injection import InjectedFaults
from cortex.runtime.model_state import State
from cortex.runtime.supervisor import Supervisor
from engine_fakes import answer, greedy
from supervisor_fakes import FakeModelFiles, eventually

PROMPT = [3, 1, 4]
LONG_TOKENS = 300
DEADLINES = Deadlines(step_seconds=4.0, load_stall_seconds=4.0)


class FaultyNode:
    """The supervisor, and what a test asks of it."""

    def __init__(self, faults: str) -> None:
        self.files = FakeModelFiles()
        self.supervisor = Supervisor(
            [DeviceSpec(index, f"cpu:{index}", 2**24, 1) for index in range(2)],
            files=self.files,
            taps=Tap(None, "supervisor"),
            backoff=lambda _: 0.0,
            deadlines=DEADLINES,
            faults=InjectedFaults(faults),
            options=EngineOptions(speculation=False),  # a step is a token
        )

    async def load(self, model_id: str, device: int) -> None:
        await self.supervisor.load(LoadRequest(model_id, devices=[device]))
        await self.supervisor.loaded(model_id)

    def generate(self, model_id: str, tokens: int = LONG_TOKENS) -> Generation:
        return self.supervisor.generate(model_id, PROMPT, greedy(tokens))

    async def serves_again(self, model_id: str) -> bool:
        """Wait until *model_id* is loaded; return whether it says what it should."""
        await eventually(
            lambda: self.supervisor.models[model_id].state is State.LOADED, "the model", 40.0
        )
        return await says(self.generate(model_id, 20)) == (answer(PROMPT, 20), None)


async def says(generation: Generation) -> tuple[list[int], ApiError | None]:
    """Return the tokens that come, and what the generation fails with."""
    tokens: list[int] = []
    try:
        async for batch in generation:
            tokens += [record.token_id for record in batch if record.flags & Flag.TOKEN]
    except ApiError as exc:
        return tokens, exc
    return tokens, None


@contextlib.asynccontextmanager
async def faulty_node(faults: str = "") -> AsyncIterator[FaultyNode]:
    """Run a node in which *faults* happen; fail where it leaves a process or a descriptor."""
    before = descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "ForkServer", partial(ForkServer, faulty_child.run))
        node = FaultyNode(faults)
        async with node.supervisor:
            for device in node.supervisor.devices:
                await device.become_ready()
            yield node
    assert multiprocessing.active_children() == []
    await eventually(lambda: descriptors() <= before, "its descriptors to be given back")


def descriptors() -> int:
    """Return how many this process has open, but for those that multiprocessing keeps for good."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would open one more
