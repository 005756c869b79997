"""A program that is a supervisor with two busy device processes, to be killed by a test.

    python supervisor_victim.py idle|gil|spin|fail

Prints the numbers of its fork server, its resource tracker and its children, then waits. With
``fail`` it then ends by an exception instead.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from multiprocessing import resource_tracker

import zmq.asyncio

import supervised_child
from cortex.ipc.log import configure_logging
from cortex.ipc.messages import SamplingParams
from cortex.ipc.taps import Tap
from cortex.runtime import fork_server
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_life import DeviceLife
from cortex.runtime.device_process import DeviceProcess

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=1)


async def be_a_supervisor(how: str) -> None:
    """Start two devices, make them busy, say who is who, and wait for the end."""
    server = fork_server.ForkServer(supervised_child.main, preload="light_preload")
    context = zmq.asyncio.Context()

    def begin(spec: DeviceSpec, ids: itertools.count[int]) -> DeviceLife:
        return DeviceLife(spec, ids, fork=server.fork, context=context, tap=Tap(None, "supervisor"))

    devices = [DeviceProcess(DeviceSpec(i, f"cpu:{i}", 1, 1), begin) for i in range(2)]
    async with asyncio.TaskGroup() as tasks:
        for device in devices:
            tasks.create_task(device.run())
        for device in devices:
            await device.become_ready()
            if how in {"gil", "spin"}:
                await anext(device.generate(how, [1], GREEDY))
        tracker: int = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined] # private
        pids = [server.pid, tracker, *(device.pid for device in devices)]
        print(json.dumps(pids), flush=True)
        if how == "fail":
            raise RuntimeError("a bug in the supervisor")
        await asyncio.sleep(60)


if __name__ == "__main__":
    fork_server.prepare("light_preload")
    configure_logging("neuron")
    asyncio.run(be_a_supervisor(sys.argv[1]))
