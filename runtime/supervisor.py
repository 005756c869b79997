"""The neuron's heart: owns its devices and its models, and is the only writer of their states.

    devices     one task each lets one life follow another (``device_process.py``)
    models      a table by id (``served_model.py``); loads queue up, one at a time per device

A device that is lost takes its generations with it and makes its models RECOVERING; when it is
ready again they are loaded again, as they were. The devices that share a model with it are ended
with it (``device_groups.py``). Every task lives in one TaskGroup: what goes wrong
with a model or a device is recorded there, and an exception that nobody expected ends the daemon
with its traceback instead of being lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

import structlog
import zmq.asyncio

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.errors import ApiError, Conflict, RouteNotFound, ShuttingDown
from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import LoadEstimate, LoadRequest
from cortex.ipc.taps import Tap
from cortex.runtime import device_state
from cortex.runtime.admission import shutting_down
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_choice import Group, choose_devices, largest_devices
from cortex.runtime.device_conversation import Running
from cortex.runtime.device_life import DeviceLife, Life
from cortex.runtime.device_process import Clock, DeviceProcess
from cortex.runtime.footprints import Footprints
from cortex.runtime.fork_server import ForkServer
from cortex.runtime.generation import Generation
from cortex.runtime.hang_watch import Deadlines
from cortex.runtime.injection import InjectedFaults
from cortex.runtime.memory_books import MemoryBooks
from cortex.runtime.model_loads import Files, ModelLoads
from cortex.runtime.model_state import FAILED_SHOWN_SECONDS, State, phase
from cortex.runtime.served_model import ServedModel, not_loaded

STOP_GRACE_SECONDS = 5.0

_log = structlog.get_logger()


class Supervisor:
    """Devices and models of one neuron; an async context manager, in the main thread's loop.

    ``fork_server.prepare()`` has to come first. *files* is closed with it. *begin_life* is for
    tests.
    """

    def __init__(
        self,
        devices: Sequence[DeviceSpec],
        *,
        files: Files,
        taps: Tap,
        log_level: str = "info",
        clock: Clock = time.monotonic,
        begin_life: Callable[[DeviceSpec, itertools.count[int]], Life] | None = None,
        backoff: Callable[[int], float] = device_state.backoff_seconds,
        footprints: Footprints | None = None,
        deadlines: Deadlines = Deadlines(),  # noqa: B008 - frozen
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        faults: InjectedFaults | None = None,
    ) -> None:
        self.is_draining = False
        self._clock = clock
        self._taps = taps
        self._log_level = log_level
        self._begin_life = begin_life
        self._deadlines = deadlines
        self._options = options
        self._faults = faults
        self._files = files if faults is None else faults.around(files)
        self._models: dict[str, ServedModel] = {}
        self.memory = MemoryBooks(self._models)
        self._loads = ModelLoads(self._files, self.memory, footprints or Footprints(None), clock)
        self._tasks = asyncio.TaskGroup()
        self._exits = contextlib.ExitStack()
        self.devices = [
            DeviceProcess(spec, self._begin, clock=clock, backoff=backoff) for spec in devices
        ]

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """Models by id; a failed one is shown for ten minutes."""
        for model in list(self._models.values()):
            is_old = self._clock() - model.since >= FAILED_SHOWN_SECONDS
            if model.state is State.FAILED and is_old:
                del self._models[model.id]
        return self._models

    def free_bytes(self, index: int) -> int:
        """Return what of a device's budget no model holds, no load on its way and nobody else."""
        return self.memory.free_bytes(self.devices[index])

    async def __aenter__(self) -> Self:
        self._exits.callback(self._files.close)
        self._exits.callback(self._loads.groups.close)
        if self._begin_life is None:
            self._begin_life = self._real_lives()
        await self._tasks.__aenter__()
        for device in self.devices:
            device.on_change = self._device_changed
            self._tasks.create_task(device.run(), name=f"device {device.spec.name}")
        return self

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.is_draining = True
        with self._exits:
            try:
                await self._stop()
            finally:
                if isinstance(error, Exception):  # the caller's own: let it out as it is, ungrouped
                    type_ = error = traceback = None
                await self._tasks.__aexit__(type_, error, traceback)

    async def load(self, request: LoadRequest) -> ServedModel:
        """Queue a load; the same one again is the same load.

        Raise Unloadable for what cannot work, LoadedDifferently for a model that is here otherwise.
        """
        self._refuse_while_draining()
        if known := self._known(request):
            return known
        self._files.refuse(request)
        verdict = await self._loads.examine_soon(request, self._choose(request))
        self._refuse_while_draining()
        if known := self._known(request):  # another load of it was faster
            return known
        devices = self._choose(request)  # as it is by now
        model = self._models[request.model_id] = ServedModel(request, devices, self._clock)
        model.is_examined, model.estimate_bytes = verdict.is_final, verdict.estimate_bytes
        model.bringing_up = self._tasks.create_task(self._loads.bring_up(model))
        return model

    async def estimate(self, request: LoadRequest) -> LoadEstimate:
        """Return what a load would take, whatever is loaded; raise Unloadable as ``load`` would.

        It is judged by the whole memory of the largest devices, because room can be made.
        """
        self._files.refuse(request)
        return await self._loads.estimate(request, largest_devices(request, self.devices))

    async def loaded(self, model_id: str) -> ServedModel:
        """Return the model once it is loaded; raise what it failed with, ModelNotFound if gone."""
        model = self._find(model_id)
        await model.until_settled()
        return model

    async def unload(self, model_id: str, force: bool = False) -> None:
        """Unload, or stop a load; raise Conflict while requests run on it, unless *force*."""
        model = self._find(model_id)
        model.refuse_unload(force=force)
        model.begin_unload()
        unloading = self._tasks.create_task(self._take_off(model))
        error = await asyncio.shield(unloading)  # the unload goes on where nobody waits for it
        if error is not None:
            raise error

    async def restart_device(self, index: int, force: bool = False) -> None:
        """Give a device a new process and wait for it; raise Conflict while busy, unless *force*.

        Its models are loaded again; devices that share one with it begin anew with it. A device
        that was given up is tried anew.
        """
        self._refuse_while_draining()
        device = next((device for device in self.devices if device.spec.index == index), None)
        if device is None:
            raise RouteNotFound(f"this neuron has no device {index}")
        if not force:
            self._refuse_while_busy(device)
        device.restart()
        await device.become_ready()

    async def clear_prefix_cache(self, model_id: str) -> int:
        """Return how many blocks of computed prompts were forgotten; raise what ``generate`` does.

        What runs goes on.
        """
        self._refuse_while_draining()
        model = self._find(model_id)
        model.refuse_unless_loaded()
        return await model.device.clear_prefix_cache(model_id)

    def generate(
        self,
        model_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        priority: int = 0,
    ) -> Generation:
        """Start a sequence.

        Raise ModelNotFound, ModelLoading, Recovering, ShuttingDown, or NodeFailed where the model's
        device was given up.
        """
        self._refuse_while_draining()
        model = self._find(model_id)
        model.refuse_unless_loaded()
        return model.device.generate(model_id, prompt_token_ids, sampling, priority)

    async def embed(
        self, model_id: str, token_ids: list[int], pooling: Literal["last", "mean"]
    ) -> bytes:
        """Return one vector of the tokens; raise what ``generate`` does, or what it failed with."""
        self._refuse_while_draining()
        model = self._find(model_id)
        model.refuse_unless_loaded()
        return await model.device.embed(model_id, token_ids, pooling).wait()

    async def drain(self, timeout_seconds: float) -> None:
        """Take nothing new and let what runs finish; what runs or loads in the end fails."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                for running in self._running():
                    await running.ended.wait()
        for running in self._running():
            running.cancel()
            running.fail(ShuttingDown("the neuron stops and this request took too long"))
        self._give_up_loads()

    def _choose(self, request: LoadRequest) -> list[DeviceProcess]:
        return choose_devices(request, self.devices, self.memory.free_bytes, self._groups())

    def _groups(self) -> set[Group]:
        """Return the groups that models use, or are about to."""
        return {
            tuple(device.spec.index for device in model.devices)
            for model in self._models.values()
            if len(model.devices) > 1 and model.state is not State.FAILED
        }

    def _running(self) -> list[Running]:
        return [running for device in self.devices for running in device.running]

    def _known(self, request: LoadRequest) -> ServedModel | None:
        """Return the model where *request* asks for what is here; raise where it cannot be."""
        known = self.models.get(request.model_id)
        if known is None or known.state is State.FAILED:
            return None
        if known.state is State.UNLOADING:
            raise Conflict(f"model {known.id!r} is being unloaded: try again when it is gone")
        known.refuse_other(request)
        return known

    def _find(self, model_id: str) -> ServedModel:
        model = self.models.get(model_id)
        if model is None:
            raise not_loaded(model_id)
        return model

    def _refuse_while_draining(self) -> None:
        if self.is_draining:
            raise shutting_down()

    def _refuse_while_busy(self, device: DeviceProcess) -> None:
        there = self._models_on(device)
        running = sum(len(model.running) for model in there)
        moving = [model.id for model in there if model.state in {State.LOADING, State.UNLOADING}]
        if running or moving:
            what = f"{running} requests run" if running else f"{', '.join(moving)} is on the way"
            raise Conflict(f"device {device.spec.name} is busy: {what}; wait, or use force")

    def _models_on(self, device: DeviceProcess) -> list[ServedModel]:
        return [model for model in self._models.values() if device in model.devices]

    def _begin(self, spec: DeviceSpec, ids: itertools.count[int]) -> Life:
        assert self._begin_life is not None, "devices live inside the supervisor's context"
        return self._begin_life(spec, ids)

    def _real_lives(self) -> Callable[[DeviceSpec, itertools.count[int]], Life]:
        server = ForkServer()
        context = zmq.asyncio.Context(io_threads=1)
        self._exits.callback(server.close)
        self._exits.callback(context.destroy, linger=0)
        return lambda spec, ids: DeviceLife(
            spec,
            ids,
            fork=server.fork,
            context=context,
            tap=self._taps,
            log_level=self._log_level,
            deadlines=self._deadlines,
            options=self._options,
            faults=self._faults.next_life(spec.name) if self._faults else None,
        )

    async def _take_off(self, model: ServedModel) -> ApiError | None:
        error = await self._loads.take_off(model)
        if error is None:
            del self._models[model.id]
            _log.info("model unloaded", model=model.id, device=model.places)
        return error

    def _give_up_loads(self) -> None:
        for model in self._models.values():
            if phase(model.state) is None and model.state is not State.RECOVERING:
                continue
            if model.bringing_up is not None:
                model.bringing_up.cancel()
            model.fail(shutting_down())

    async def _stop(self) -> None:
        self._give_up_loads()
        followers = {device for group in self._groups() for device in self._led(group)}
        leaders = [device for device in self.devices if device not in followers]
        for devices in (leaders, followers):  # a leader may still need them for its last step
            await asyncio.gather(*(device.stop(STOP_GRACE_SECONDS) for device in devices))

    def _led(self, group: Group) -> list[DeviceProcess]:
        return [device for device in self.devices if device.spec.index in group[1:]]

    def _device_changed(self, device: DeviceProcess, before: device_state.State) -> None:
        is_lost = before is device_state.State.READY and not device.is_ready
        models = self._models_on(device)
        if is_lost and device.state != "stopped":
            is_used = any(len(model.devices) > 1 and model.is_on_device for model in models)
            self._loads.groups.lost(device, is_used=is_used)
        for model in models:
            if is_lost:
                model.lose_device()
            model.look_again()
            is_back = model.are_devices_ready and not self.is_draining
            if model.state is State.RECOVERING and is_back:
                model.bringing_up = self._tasks.create_task(self._loads.recover(model))
