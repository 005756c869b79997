"""The engine as a neuron runs it, without HTTP: a supervisor, its fork server, one device process.

What scripts/bench-http compares a neuron with, as a child (``children.py``). The tokens come
through the ring into a loop that counts them and does nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import uvloop
from answers import MODEL
from children import answers_kept
from processes import cpu_seconds_by_name

from cortex.ipc.log import configure_logging
from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.ring import Flag
from cortex.ipc.taps import SUPERVISOR, Tap
from cortex.runtime import fork_server
from cortex.runtime.config import DeviceConfig, NeuronConfig
from cortex.runtime.device_budget import resolve_devices
from cortex.runtime.discovery import Inventory
from cortex.runtime.host import Host
from cortex.runtime.model_files import ModelFiles
from cortex.runtime.serving import GIL_SECONDS
from cortex.runtime.supervisor import Supervisor


async def serve() -> None:
    """Load the model, then answer until there are no more questions."""
    loop = asyncio.get_running_loop()
    config = NeuronConfig(devices=[DeviceConfig("cpu:0")])
    devices = resolve_devices(config, Inventory(), Host.read())
    supervisor = Supervisor(
        devices, files=ModelFiles(config.places), taps=Tap(None, SUPERVISOR), log_level="info"
    )
    with answers_kept() as out:
        async with supervisor:
            await supervisor.devices[0].become_ready()
            await supervisor.load(LoadRequest(MODEL))
            await supervisor.loaded(MODEL)
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                _, details = json.loads(line)
                out.write(json.dumps(await generate(supervisor, **details)) + "\n")


async def generate(
    supervisor: Supervisor, prompts: Sequence[list[int]], tokens: int
) -> dict[str, Any]:
    """Run *prompts* together, *tokens* each, and return seconds, tokens and CPU seconds."""
    before = cpu_seconds_by_name(os.getpid())
    began = time.perf_counter()
    counts = await asyncio.gather(*(count(supervisor, prompt, tokens) for prompt in prompts))
    seconds = time.perf_counter() - began
    after = cpu_seconds_by_name(os.getpid())
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    return {"seconds": seconds, "tokens": sum(counts), "cpu_seconds": spent}


async def count(supervisor: Supervisor, prompt: list[int], tokens: int) -> int:
    """Return how many tokens came."""
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, seed=0)
    seen = 0
    async with supervisor.generate(MODEL, prompt, sampling) as generation:
        async for records in generation:
            seen += sum(record.flags & Flag.TOKEN for record in records)
    return seen


if __name__ == "__main__":
    fork_server.set_title("neuron supervisor")
    sys.setswitchinterval(GIL_SECONDS)
    fork_server.prepare()
    configure_logging("neuron")
    uvloop.run(serve())
