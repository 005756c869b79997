"""The faults that a test orders of the whole supervisor; ``cortex.ipc.injection`` spells them.

InjectedFaults   hands out those of each life (``life_faults.py``), and breaks downloads
FaultyFiles      files whose download breaks off, or never ends
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from cortex.ipc.errors import Unloadable
from cortex.ipc.injection import Passes, of_life, parse
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.device_conversation import Progress
from cortex.runtime.life_faults import LifeFaults
from cortex.runtime.model_loads import Files


class InjectedFaults:
    """Every fault that was ordered; *text* may be empty, and then there are none."""

    def __init__(self, text: str) -> None:
        self._faults = parse(text)
        self._lives: Counter[str] = Counter()

    def next_life(self, device: str) -> LifeFaults | None:
        """Return what goes wrong in the life of *device* that begins now, None for nothing."""
        self._lives[device] += 1
        faults = of_life(self._faults, device, self._lives[device])
        return LifeFaults(faults) if faults else None

    def around(self, files: Files) -> Files:
        """Return *files*, with their faults."""
        passes = Passes(self._faults, "download")
        return FaultyFiles(files, passes) if passes else files


class FaultyFiles:
    """Files whose download goes wrong."""

    def __init__(self, files: Files, passes: Passes) -> None:
        self._passes = passes
        self._files = files
        self.refuse = files.refuse
        self.examine = files.examine
        self.estimate = files.estimate
        self.read = files.read
        self.in_situ = files.in_situ
        self.close = files.close

    async def fetch(self, request: LoadRequest, progress: Progress) -> Path:
        """Return where the files lie, or break off, or never return."""
        match self._passes.strikes():
            case "broken":
                progress(1, 100)
                raise Unloadable("the download broke off: injected", kind="network_unreachable")
            case "hang":
                progress(1, 100)
                await asyncio.Event().wait()
            case _:
                pass
        return await self._files.fetch(request, progress)
