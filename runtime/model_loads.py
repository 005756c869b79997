"""Taking a model from QUEUED to LOADED, on again after its device was lost, and off.

One download at a time per device, and one load: the others wait for their turn, in order. They are
two turns, so that a lost model comes back while another is downloaded for an hour. A model on
several devices needs the turns of all of them, which it takes in the order of their indices, as
everybody does, so nobody waits in a circle. Its ranks load at the same time; where one cannot, the
others give back what they have.

Whatever goes wrong with a load is recorded in its model, never raised.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from cortex.ipc.errors import ApiError, InternalError, NodeFailed, PeerGone, Unloadable
from cortex.ipc.messages import Event, Footprint, LoadModel, ModelLoaded, UnloadModel
from cortex.ipc.node_api import LoadEstimate, LoadRequest
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_conversation import Progress, Refused
from cortex.runtime.device_groups import DeviceGroups, RankProgress, ask_all, raise_error
from cortex.runtime.device_process import Clock, DeviceProcess
from cortex.runtime.estimates import Estimate
from cortex.runtime.footprints import Footprints
from cortex.runtime.memory_books import MemoryBooks
from cortex.runtime.model_state import On, State
from cortex.runtime.progress import DownloadLog
from cortex.runtime.served_model import InSitu, ServedModel
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

        Return the bytes that it would like to hold of each of its devices, None where nobody knows
        yet. *free_bytes* is what there is on each, *measured* what an earlier load of the same held
        there.
        """

    async def estimate(
        self, request: LoadRequest, device: DeviceSpec, measured: Footprint | None = None
    ) -> Estimate | None:
        """Return what it would take of each of its devices, None where only a download tells.

        Raise Unloadable where not even the whole *device*, the smallest of them, would do.
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

    async def in_situ(self, path: Path, request: LoadRequest) -> InSitu | None:
        """Return how the weights at *path* are quantised while they are loaded."""

    def close(self) -> None:
        """Take no more work."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about a load before it was accepted."""

    is_final: bool
    """Whether its headers were judged; else they are in its turn."""
    estimate_bytes: int | None
    """What it would like to hold of each device; None where nobody knows yet."""


class ModelLoads:
    """The loads and unloads of all devices."""

    def __init__(
        self, files: Files, memory: MemoryBooks, footprints: Footprints, clock: Clock
    ) -> None:
        self._files = files
        self._memory = memory
        self._footprints = footprints
        self._clock = clock
        self.groups = DeviceGroups()
        self._saving = asyncio.Lock()
        self._downloads = Turns()
        self._turns = Turns()

    async def examine_soon(self, request: LoadRequest, devices: Sequence[DeviceProcess]) -> Verdict:
        """Return what is known of a load within seconds; raise Unloadable for what cannot work."""
        device = self._memory.least_room(devices)
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

    async def estimate(
        self, request: LoadRequest, devices: Sequence[DeviceProcess]
    ) -> LoadEstimate:
        """Return what is known within seconds of what a load takes in all; raise Unloadable."""
        device = min(devices, key=lambda device: device.spec.memory_bytes)
        measured = self._footprints.of(request, device.spec.name)
        found = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXAMINE_SECONDS):
                found = await self._files.estimate(request, device.spec, measured)
        if found is None and measured is not None:  # as much as it held will do
            found = Estimate(measured.total_bytes, measured.total_bytes)
        if found is None:
            return LoadEstimate()
        least_mb, wanted_mb = (
            len(devices) * -(-number // MIB) for number in (found.least_bytes, found.wanted_bytes)
        )
        return LoadEstimate(least_mb, wanted_mb, is_measured=measured is not None)

    async def bring_up(self, model: ServedModel) -> None:
        """Take a model from QUEUED to LOADED or FAILED."""
        with self._recording_failure(model):
            async with self._downloads.of(model):
                model.advance(On.TURN)
                if not model.is_examined:
                    model.estimate_bytes = await self._files.examine(*self._judged_by(model))
                download = DownloadLog(model.id, model.report, self._clock)
                model.path = await self._files.fetch(model.request, download)
                download.end()
            async with self._turns.of(model):
                model.text = await self._files.read(model.path, *self._judged_by(model))
                model.quant = await self._files.in_situ(model.path, model.request)
                await self._until_ready(model)
                model.advance(On.FETCHED)
                try:
                    await self._put_on(model)
                except PeerGone as exc:
                    raise NodeFailed(f"while model {model.id!r} was loaded, {exc}") from exc

    async def recover(self, model: ServedModel) -> None:
        """Load a model again; where a device of it dies again, its next life does."""
        async with self._turns.of(model):
            if model.state is State.RECOVERING and model.are_devices_ready:
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

    async def _until_ready(self, model: ServedModel) -> None:
        """Return once all devices of *model* are ready at the same time."""
        while not model.are_devices_ready:
            for device in model.devices:
                await device.become_ready()

    async def _put_on(self, model: ServedModel) -> None:
        model.is_on_device = True
        started = self._clock()
        group = await self.groups.join(model.devices) if len(model.devices) > 1 else None
        _refuse_lost(model)
        answers = await ask_all(
            model.devices,
            lambda _, command_id: load_command(command_id, model, group),
            timeout_seconds=LOAD_TIMEOUT_SECONDS,
            progress=_summed(model),
        )
        loaded = [answer for answer in answers if isinstance(answer, ModelLoaded)]
        if len(loaded) < len(answers):
            await self._give_back(model, answers)
            raise_error(answers)
        _refuse_lost(model)  # it died between its answer and our reading of it
        if model.state is not State.UNLOADING:
            model.settle(loaded)
            seconds = round(self._clock() - started, 3)
            _log.info("model loaded", model=model.id, device=model.places, seconds=seconds)
        await self._keep(model, max((a.footprint for a in loaded), key=lambda f: f.total_bytes))

    async def _give_back(
        self, model: ServedModel, answers: Sequence[Event | BaseException]
    ) -> None:
        """Unload the ranks that have loaded, because another one could not."""
        there = [
            device
            for device, answer in zip(model.devices, answers, strict=True)
            if isinstance(answer, ModelLoaded)
        ]
        await _unload_from(there, model.id)

    def _judged_by(self, model: ServedModel) -> tuple[LoadRequest, int, Footprint | None]:
        device = self._memory.least_room(model.devices)
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
            for device in model.devices:
                device.cycles += 1
        if model.bringing_up is not None:
            model.bringing_up.cancel()
            await asyncio.wait([model.bringing_up])

    async def _tell_unload(self, model: ServedModel) -> None:
        """Send UnloadModel; where a running load forbids it, once more when that has ended.

        The rank 0 first: what it has sent the others before, they still compute.
        """
        leader, others = model.devices[:1], model.devices[1:]
        try:
            raise_error(await _unload_from(leader, model.id))
        except Refused:
            if model.bringing_up is None or model.bringing_up.done():
                raise
            await asyncio.wait([model.bringing_up])
            if not model.is_on_device:
                return
            raise_error(await _unload_from(leader, model.id))
        raise_error(await _unload_from(others, model.id))

    @contextlib.contextmanager
    def _recording_failure(self, model: ServedModel) -> Iterator[None]:
        """Whatever goes wrong inside becomes the model's failure."""
        try:
            yield
        except Unloadable as exc:
            self._fail(model, self._named(exc, self._memory.least_room(model.devices)))
        except ApiError as exc:
            self._fail(model, exc)
        except Refused as exc:
            refusal = refused_load(exc, len(model.devices))
            self._fail(model, self._named(refusal, self._memory.least_room(model.devices)))
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


class Turns:
    """A lock for each device."""

    def __init__(self) -> None:
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    @contextlib.asynccontextmanager
    async def of(self, model: ServedModel) -> AsyncIterator[None]:
        """Hold the turns of all devices of *model*, which are in the order of their indices."""
        async with contextlib.AsyncExitStack() as held:
            for device in model.devices:
                await held.enter_async_context(self._locks[device.spec.index])
            yield


def refused_load(refused: Refused, ranks: int) -> Unloadable:
    """Return the error of a load that a device has *refused*; its numbers are of that device."""
    failed = refused.failed
    shared = {"ranks": ranks} if ranks > 1 else {}
    return Unloadable(failed.detail, kind=failed.code, **failed.numbers, **shared)


def _refuse_lost(model: ServedModel) -> None:
    lost = next((device for device in model.devices if not device.is_ready), None)
    if lost is not None:
        raise PeerGone(f"device {lost.spec.name} was lost")


def _summed(model: ServedModel) -> RankProgress:
    """Return what reports the bytes of all ranks together."""
    done, total = ([0] * len(model.devices) for _ in range(2))

    def report(rank: int, bytes_done: int, bytes_total: int) -> None:
        done[rank], total[rank] = bytes_done, bytes_total
        model.report(sum(done), sum(total))

    return report


async def _unload_from(
    devices: Sequence[DeviceProcess], model_id: str
) -> list[Event | BaseException]:
    return await ask_all(
        devices,
        lambda _, command_id: UnloadModel(command_id, model_id),
        timeout_seconds=UNLOAD_TIMEOUT_SECONDS,
    )


def load_command(command_id: int, model: ServedModel, group: str | None) -> LoadModel:
    """Return what each device has to be told to load *model*, in a *group* where it has several."""
    request, quant = model.request, model.quant
    return LoadModel(
        command_id,
        model.id,
        str(model.path),
        dtype=request.dtype,
        max_context_tokens=request.max_context_tokens,
        max_sequences=request.max_sequences,
        kv_cache_bytes=request.kv_cache_mb * MIB if request.kv_cache_mb else None,
        quant=quant.kind if quant else None,
        quant_cache=str(quant.cache) if quant else None,
        group=group,
    )
