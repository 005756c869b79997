"""One model as the neuron serves it: what was asked for, how far it is, what it holds.

On several devices it is in ranks, in the order of ``devices``; the first leads: it takes all
requests. Written by the supervisor only; read by every route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cortex.ipc.errors import (
    ApiError,
    Conflict,
    LoadedDifferently,
    ModelLoading,
    ModelNotFound,
    Recovering,
    Unloadable,
)
from cortex.ipc.messages import EngineReport, Footprint, ModelLoaded
from cortex.ipc.node_api import LoadRequest, ModelStatus, Progress, Refusal, Servable
from cortex.runtime.device_conversation import Running
from cortex.runtime.device_process import Clock, DeviceProcess
from cortex.runtime.model_state import TRANSITIONS, On, State, after, phase, public
from cortex.runtime.progress import Pace
from cortex.runtime.pulse import Pulse
from cortex.runtime.text import TextSide


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device settled on when it loaded the model."""

    max_context_tokens: int
    max_sequences: int
    kv_cache_tokens: int


@dataclass(frozen=True, slots=True)
class InSitu:
    """Weights that become *kind* while they are loaded, and what came of it is kept in *cache*."""

    kind: str
    cache: Path


class ServedModel:
    """A model in the supervisor's table."""

    def __init__(
        self, request: LoadRequest, devices: Sequence[DeviceProcess], clock: Clock
    ) -> None:
        self.request = request
        self.devices = tuple(devices)
        self.state = State.QUEUED
        self.since = clock()
        """When the state began, by the supervisor's clock."""
        self.error: ApiError | None = None
        self.path: Path | None = None
        self.text: TextSide | None = None
        self.quant: InSitu | None = None
        """How its weights are quantised while they are loaded."""
        self.footprints: tuple[Footprint, ...] = ()
        """What it holds on each of its devices, once it is loaded."""
        self.limits: Limits | None = None
        self.bringing_up: asyncio.Task[None] | None = None
        """The task that loads it, or loads it again."""
        self.is_examined = False
        """Whether its headers were judged before its load was accepted."""
        self.estimate_bytes: int | None = None
        """What it is expected to hold of each device, while that is not measured; None: unknown."""
        self.is_on_device = False
        """Whether its devices were told to load it in this life, and did not refuse."""
        self._clock = clock
        self._pace = Pace(clock)
        self._changed = Pulse()

    @property
    def id(self) -> str:
        """The name that requests use."""
        return self.request.model_id

    @property
    def device(self) -> DeviceProcess:
        """The one that leads."""
        return self.devices[0]

    @property
    def are_devices_ready(self) -> bool:
        """Whether all of them take commands now."""
        return all(device.is_ready for device in self.devices)

    @property
    def places(self) -> str:
        """The names of its devices, for the log and for people."""
        return ", ".join(device.spec.name for device in self.devices)

    def held_bytes(self, device: DeviceProcess) -> int:
        """Return what it has been measured to hold on *device*."""
        held = zip(self.devices, self.footprints, strict=False)
        return sum(footprint.total_bytes for place, footprint in held if place is device)

    @property
    def status(self) -> ModelStatus:
        """The public name of the state."""
        return public(self.state)

    @property
    def failure(self) -> str | None:
        """Why it failed, in words."""
        return None if self.error is None else str(self.error)

    @property
    def refusal(self) -> Refusal | None:
        """What it could not be loaded for, as a program reads it; None for any other failure."""
        if not isinstance(self.error, Unloadable):
            return None
        facts = dict(self.error.extras)
        return Refusal(facts.pop("kind"), facts)

    @property
    def running(self) -> list[Running]:
        """What runs on it now."""
        return self.device.of_model(self.id)

    @property
    def engine(self) -> EngineReport | None:
        """How its engine stands, as the device said last; None before the first request."""
        return self.device.report_of(self.id)

    @property
    def progress(self) -> Progress | None:
        """How far it is on its way, None where it is not."""
        at = phase(self.state)
        if at is None:
            return None
        pace = self._pace
        return Progress(at, pace.bytes_done, pace.bytes_total, pace.eta_seconds)

    @property
    def servable(self) -> Servable:
        """What a request would meet."""
        if self.state is not State.FAILED and (lost := self._poisoned()):
            return Servable(ok=False, reason="device_poisoned", detail=lost.failure)
        if self.state is State.LOADED:
            return Servable(ok=True)
        return Servable(ok=False, reason=self.status, detail=self.failure)

    def refuse_unless_loaded(self) -> None:
        """Raise what a request that needs the model now has to be told."""
        if self.state is State.LOADED:
            return
        if self.state is State.RECOVERING:
            for device in self.devices:
                device.refuse_if_lost_for_good()
            lost = [device.spec.name for device in self.devices if not device.is_ready]
            raise Recovering(
                f"model {self.id!r} is loaded again: its device "
                f"{' and '.join(lost) or self.places} restarts",
                retry_after_seconds=2,
            )
        if self.progress is not None:
            raise ModelLoading(
                f"model {self.id!r} is {self.progress.phase}",
                retry_after_seconds=max(1, round(self.progress.eta_seconds or 2)),
            )
        raise not_loaded(self.id, self.failure)

    def refuse_other(self, request: LoadRequest) -> None:
        """Raise LoadedDifferently unless *request* asks for what this model is."""
        asked, got = _comparable(request), _comparable(self.request)
        differing = [name for name, value in asked.items() if value != got[name]]
        there = [device.spec.index for device in self.devices]
        if request.ranks != len(there):
            differing.append("tensor_parallel")
        elif request.devices is not None and sorted(request.devices) != there:
            differing.append("devices")
        if differing:
            raise LoadedDifferently(
                f"model {self.id!r} is {self.status} with other values of "
                f"{' and '.join(differing)}: unload it first"
            )

    def refuse_unload(self, *, force: bool) -> None:
        """Raise Conflict where it cannot be unloaded now."""
        if self.state is State.UNLOADING:
            raise Conflict(f"model {self.id!r} is being unloaded already")
        running = len(self.running)
        if running and not force:
            raise Conflict(f"{running} requests run on model {self.id!r}: wait, or use force")

    def advance(self, on: On) -> None:
        """Move to the state that follows."""
        self.state = after(self.state, on)
        self.since = self._clock()
        self._pace = Pace(self._clock)
        self._changed.beat()

    def begin_unload(self) -> None:
        """Start to leave: requests that still run fail, a download stops at once."""
        self.device.fail_model(
            self.id, ModelNotFound(f"model {self.id!r} was unloaded by force", param="model")
        )
        self.advance(On.UNLOAD)
        if self.bringing_up is not None and not self.is_on_device:
            self.bringing_up.cancel()

    def lose_device(self) -> None:
        """Its device has lost it; what was loaded will be loaded again."""
        self.is_on_device = False
        if (self.state, On.DEVICE_LOST) in TRANSITIONS:
            self.advance(On.DEVICE_LOST)

    def look_again(self) -> None:
        """Wake the waiters: its device has changed."""
        self._changed.beat()

    def report(self, bytes_done: int, bytes_total: int) -> None:
        """Note how far the download, or the load, has come."""
        self._pace.note(bytes_done, bytes_total)

    def fail(self, error: ApiError) -> None:
        """Record why it failed."""
        self.error = error
        self.footprints, self.text = (), None
        self.is_on_device = False
        self.advance(On.FAILED)

    def settle(self, loaded: Sequence[ModelLoaded]) -> None:
        """Record what each device made of it; their limits agree."""
        self.footprints = tuple(answer.footprint for answer in loaded)
        self.limits = Limits(
            loaded[0].max_context_tokens, loaded[0].max_sequences, loaded[0].kv_cache_tokens
        )
        self.advance(On.LOADED)

    async def until_settled(self) -> None:
        """Return once it is loaded; raise what it failed with, or ModelNotFound if unloaded."""
        await self._changed.until(
            lambda: (
                self.state in {State.LOADED, State.FAILED, State.UNLOADING}
                or (self.state is State.RECOVERING and self._poisoned() is not None)
            )
        )
        if self.error is not None:
            raise self.error
        self.refuse_unless_loaded()

    def _poisoned(self) -> DeviceProcess | None:
        return next((device for device in self.devices if device.is_poisoned), None)


def not_loaded(model_id: str, failure: str | None = None) -> ModelNotFound:
    """Return the error for a model that is not there; it names the way to get it there."""
    why = f" (its load failed: {failure})" if failure else ""
    return ModelNotFound(
        f"model {model_id!r} is not loaded on this neuron{why}: POST /models/load first",
        param="model",
    )


def _comparable(request: LoadRequest) -> dict[str, object]:
    """Return what makes two loads the same; devices are compared with where the model is."""
    return {
        "quant": request.quant.upper() if request.quant else None,
        "dtype": request.dtype,
        "max_context_tokens": request.max_context_tokens,
        "kv_cache_mb": request.kv_cache_mb,
        "max_sequences": request.max_sequences,
        "sampling": request.sampling,
        "tool_prompt": request.tool_prompt,
        "tool_parser": request.tool_parser,
        "reasoning_parser": request.reasoning_parser,
    }
