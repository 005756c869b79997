"""A program that is a supervisor of one real CPU device; says how its start and a restart went.

Prints one JSON object: what the device process said, the seconds to its Hello, cold and again, and
whether this process, a supervisor, has torch.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from cortex.runtime import fork_server
from supervisor_fakes import FakeModelFiles


async def report(began: float) -> dict[str, object]:
    """Start a device, kill it, and wait until it is back."""
    from cortex.ipc.taps import Tap
    from cortex.runtime.config import DeviceSpec
    from cortex.runtime.supervisor import Supervisor

    supervisor = Supervisor(
        [DeviceSpec(0, "cpu:0", 2**30, 1)],
        files=FakeModelFiles(),
        taps=Tap(None, "supervisor"),
    )
    async with supervisor:
        [device] = supervisor.devices
        await device.become_ready()
        start_seconds = time.monotonic() - began
        hello = device.hello
        assert hello is not None, "a ready device has said Hello"
        title = _title(device.pid)
        began = time.monotonic()
        device.restart()
        await device.become_ready()
        return {
            "preloaded": hello.preloaded,
            "server_threads": hello.server_threads,
            "torch_version": hello.torch_version,
            "title": title,
            "supervisor_has_torch": "torch" in sys.modules,
            "start_seconds": start_seconds,
            "restart_seconds": time.monotonic() - began,
        }


def _title(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


if __name__ == "__main__":
    begun = time.monotonic()
    fork_server.prepare()
    from cortex.ipc.log import configure_logging

    configure_logging("neuron")
    print(json.dumps(asyncio.run(report(begun))))
