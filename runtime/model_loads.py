"""Taking a model from QUEUED to LOADED, on again after its device was lost, and off.

One download at a time per device, and one load: the others wait for their turn, in order. They are
two turns, so that a lost model comes back while another is downloaded for an hour. Whatever goes
wrong with a load is recorded in its model, never raised.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from cortex.ipc.errors import ApiError, InternalError, NodeFailed, PeerGone, Unloadable
from cortex.ipc.messages import Footprint, LoadModel, ModelLoaded, UnloadModel
from cortex.ipc.node_api import LoadEstimate, LoadRequest
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_conversation import Progress, Refused
from cortex.runtime.device_process import Clock, DeviceProcess
from cortex.runtime.estimates import Estimate
from cortex.runtime.footprints import Footprints
from cortex.runtime.memory_books import MemoryBooks
from cortex.runtime.model_state import On, State
from cortex.runtime.progress import DownloadLog
from cortex.runtime.served_model import ServedModel
from cortex.runtime.text import TextSide

LOAD_TIMEOUT_SECONDS = 1800.0
EXAMINE_SECONDS = 3.0
"""How long a caller waits for a verdict; after that the load is queued, and judged in its turn."""
UNLOAD_TIMEOUT_SECONDS = 60.0
MIB = 2**20

_log = structlog.get_logger()


class Files(Protocol):
    """What a load needs of ``ModelFiles``."""

    def refuse(self, request: LoadRequest) -> None:
        """Raise Unloadable for what is known to be impossible without looking at any file."""

    async def examine(
        self, request: LoadRequest, free_bytes: int, measured: Footprint | None = None
    ) -> int | None:
        """Raise Unloadable where headers say that it cannot work; downloads no weights.

        Return the bytes that it would like to hold, None where nobody knows yet. *measured* is what
        an earlier load of the same held.
        """

    async def estimate(
        self, request: LoadRequest, device: DeviceSpec, measured: Footprint | None = None
    ) -> Estimate | None:
        """Return what it would take, None where only a download tells.

        Raise Unloadable where not even the whole *device* would do.
        """

    async def fetch(self, request: LoadRequest, progress: Progress) -> Path:
        """Return where the files lie, downloaded first if need be; cancelling stops that."""

    async def read(
        self,
        path: Path,
        request: LoadRequest,
        free_bytes: int,
        measured: Footprint | None = None,
    ) -> TextSide:
        """Return the text side; raise Unloadable where the model cannot work."""

    def close(self) -> None:
        """Take no more work."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about a load before it was accepted."""

    is_final: bool
    """Whether its headers were judged; else they are in its turn."""
    estimate_bytes: int | None
    """What it would like to hold; None where nobody knows yet."""


class ModelLoads:
    """The loads and unloads of all devices."""

    def __init__(
        self, files: Files, memory: MemoryBooks, footprints: Footprints, clock: Clock
    ) -> None:
        self._files = files
        self._memory = memory
        self._footprints = footprints
        self._clock = clock
        self._saving = asyncio.Lock()
        self._downloads: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def examine_soon(self, request: LoadRequest, device: DeviceProcess) -> Verdict:
        """Return what is known of a load within seconds; raise Unloadable for what cannot work."""
        measured = self._footprints.of(request, device.spec.name)
        known = None if measured is None else measured.total_bytes
        try:
            async with asyncio.timeout(EXAMINE_SECONDS):
                estimate = await self._files.examine(
                    request, self._memory.room_bytes(device), measured
                )
        except TimeoutError:
            return Verdict(is_final=False, estimate_bytes=known)
        except Unloadable as exc:
            raise self._named(exc, device) from exc
        return Verdict(is_final=True, estimate_bytes=known or estimate)

    async def estimate(self, request: LoadRequest, device: DeviceProcess) -> LoadEstimate:
        """Return what is known within seconds of what a load takes; raise Unloadable."""
        measured = self._footprints.of(request, device.spec.name)
        found = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXAMINE_SECONDS):
                found = await self._files.estimate(request, device.spec, measured)
        if found is None and measured is not None:  # as much as it held will do
            found = Estimate(measured.total_bytes, measured.total_bytes)
        if found is None:
            return LoadEstimate()
        numbers = -(-found.least_bytes // MIB), -(-found.wanted_bytes // MIB)
        return LoadEstimate(*numbers, is_measured=measured is not None)

    async def bring_up(self, model: ServedModel) -> None:
        """Take a model from QUEUED to LOADED or FAILED."""
        index = model.device.spec.index
        with self._recording_failure(model):
            async with self._downloads[index]:
                model.advance(On.TURN)
                if not model.is_examined:
                    model.estimate_bytes = await self._files.examine(*self._judged_by(model))
                download = DownloadLog(model.id, model.report, self._clock)
                model.path = await self._files.fetch(model.request, download)
                download.end()
            async with self._turns[index]:
                model.text = await self._files.read(model.path, *self._judged_by(model))
                await model.device.become_ready()
                model.advance(On.FETCHED)
                try:
                    await self._put_on(model)
                except PeerGone as exc:
                    raise NodeFailed(f"while model {model.id!r} was loaded, {exc}") from exc

    async def recover(self, model: ServedModel) -> None:
        """Load a model again; where its device dies again, its next life does."""
        async with self._turns[model.device.spec.index]:
            if model.state is State.RECOVERING and model.device.is_ready:
                with self._recording_failure(model), contextlib.suppress(PeerGone):
                    await self._put_on(model)

    async def take_off(self, model: ServedModel) -> ApiError | None:
        """Free what an UNLOADING model holds; return why that failed, if it did."""
        try:
            await self._free(model)
        except Refused as exc:
            model.fail(NodeFailed(f"model {model.id!r} could not be unloaded: {exc}"))
            return model.error
        except (ApiError, PeerGone):
            pass  # the process is gone, and its memory with it
        return None

    async def _put_on(self, model: ServedModel) -> None:
        device = model.device
        model.is_on_device = True
        started = self._clock()
        answer = await device.ask(
            lambda command_id: load_command(command_id, model),
            timeout_seconds=LOAD_TIMEOUT_SECONDS,
            progress=model.report,
        )
        assert isinstance(answer, ModelLoaded), f"LoadModel was answered by {answer}"
        if not device.is_ready:  # it died between its answer and our reading of it
            raise PeerGone(f"device {device.spec.name} was lost")
        if model.state is not State.UNLOADING:
            model.settle(answer)
            seconds = round(self._clock() - started, 3)
            _log.info("model loaded", model=model.id, device=device.spec.name, seconds=seconds)
        await self._keep(model, answer.footprint)

    def _judged_by(self, model: ServedModel) -> tuple[LoadRequest, int, Footprint | None]:
        device = model.device
        measured = self._footprints.of(model.request, device.spec.name)
        return model.request, self._memory.room_bytes(device), measured

    async def _keep(self, model: ServedModel, footprint: Footprint) -> None:
        if self._footprints.keep(model.request, model.device.spec.name, footprint):
            async with self._saving:
                await asyncio.to_thread(self._footprints.save)

    def _named(self, error: Unloadable, device: DeviceProcess) -> Unloadable:
        """Return *error*, saying who else has the memory that it misses."""
        if error.kind != "insufficient_memory":
            return error
        return Unloadable(f"{error}{self._memory.foreign_words(device)}", **error.extras)

    async def _free(self, model: ServedModel) -> None:
        if model.is_on_device:
            await self._tell_unload(model)
            model.device.cycles += 1
        if model.bringing_up is not None:
            model.bringing_up.cancel()
            await asyncio.wait([model.bringing_up])

    async def _tell_unload(self, model: ServedModel) -> None:
        """Send UnloadModel; where a running load forbids it, once more when that has ended."""
        try:
            await self._ask_unload(model)
        except Refused:
            if model.bringing_up is None or model.bringing_up.done():
                raise
            await asyncio.wait([model.bringing_up])
            if model.is_on_device:
                await self._ask_unload(model)

    async def _ask_unload(self, model: ServedModel) -> None:
        await model.device.ask(
            lambda command_id: UnloadModel(command_id, model.id),
            timeout_seconds=UNLOAD_TIMEOUT_SECONDS,
        )

    @contextlib.contextmanager
    def _recording_failure(self, model: ServedModel) -> Iterator[None]:
        """Whatever goes wrong inside becomes the model's failure."""
        try:
            yield
        except Unloadable as exc:
            self._fail(model, self._named(exc, model.device))
        except ApiError as exc:
            self._fail(model, exc)
        except Refused as exc:
            refusal = Unloadable(exc.failed.detail, kind=exc.failed.code, **exc.failed.numbers)
            self._fail(model, self._named(refusal, model.device))
        except PeerGone:
            raise
        except Exception:  # noqa: BLE001 - a bug: into the log with its traceback, and the daemon goes on
            _log.exception("model could not be loaded", model=model.id)
            self._fail(model, InternalError(f"loading {model.id!r} met a bug; the log tells more"))

    def _fail(self, model: ServedModel, error: ApiError) -> None:
        model.is_on_device = False
        if model.state is not State.UNLOADING:
            _log.warning("model failed", model=model.id, reason=str(error))
            model.fail(error)


def load_command(command_id: int, model: ServedModel) -> LoadModel:
    """Return what the device has to be told to load *model*."""
    request = model.request
    return LoadModel(
        command_id,
        model.id,
        str(model.path),
        dtype=request.dtype,
        max_context_tokens=request.max_context_tokens,
        max_sequences=request.max_sequences,
        kv_cache_bytes=request.kv_cache_mb * MIB if request.kv_cache_mb else None,
    )
