"""The files of a model, as a load needs them: fetched, judged, and their text side read.

Reading blocks, so it happens in a small thread pool.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.ipc.node_api import LoadRequest
from cortex.runtime import preflight
from cortex.runtime.sources import Source, fetch
from cortex.runtime.text import TextSide

READERS = 2


class ModelFiles:
    """Where this neuron's models come from; ``file:`` may read below *roots*, None is anywhere."""

    def __init__(self, cache_directory: Path, roots: Sequence[Path] | None) -> None:
        self._cache_directory = cache_directory
        self._roots = roots
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, "model-files")

    def refuse(self, request: LoadRequest) -> None:
        """Raise Unloadable for what is known to be impossible without looking at any file."""
        preflight.check_request(request, self._roots)

    async def fetch(self, request: LoadRequest, progress: Callable[[int, int], None]) -> Path:
        """Return where the files lie, downloaded first if need be; cancelling stops that."""
        return await fetch(
            Source.parse(request.model_id, self._roots),
            request.quant,
            cache=self._cache_directory,
            on_progress=progress,
        )

    async def read(self, path: Path, request: LoadRequest, free_bytes: int) -> TextSide:
        """Return the text side; raise Unloadable where the model cannot work in *free_bytes*."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, _read, path, request, free_bytes)

    def close(self) -> None:
        """Take no more work; what runs ends by itself."""
        self._readers.shutdown(wait=False, cancel_futures=True)


def _read(path: Path, request: LoadRequest, free_bytes: int) -> TextSide:
    preflight.check(path, request, free_bytes)
    return TextSide.from_checkpoint(path)
