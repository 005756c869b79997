"""What a neuron says of itself: health, discovery and models, put together from memory.

Nothing here asks a device or a driver: state is the supervisor's, GPU readings are the last good
ones, so every answer takes well under a millisecond however busy the GPUs are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import msgspec

from cortex.ipc.errors import Overloaded
from cortex.ipc.messages import Footprint
from cortex.ipc.node_api import (
    Capabilities,
    DeviceHealth,
    DeviceInfo,
    Discovery,
    Health,
    Limit,
    ModelDevice,
    ModelInfo,
    Servable,
)
from cortex.runtime.activation import Activation
from cortex.runtime.discovery import Inventory
from cortex.runtime.node import DeviceView, ModelView, Node
from cortex.runtime.readings import Readings
from cortex.runtime.traffic import Traffics

MIB = 2**20
HARNESSES = ["torch"]
DRAINING = Servable(ok=False, reason="draining", detail="the neuron is shutting down")


class Report:
    """The node's view of itself; pure reading."""

    def __init__(
        self,
        node: Node,
        *,
        inventory: Inventory,
        readings: Readings,
        activation: Activation,
        traffics: Traffics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_draining = False
        self._node = node
        self._inventory = inventory
        self._readings = readings
        self._activation = activation
        self._traffics = traffics
        self._clock = clock
        self._started = clock()

    def health(self) -> Health:
        """Return ``GET /health``."""
        models = self._node.models
        self._traffics.forget_all_but(frozenset(models))
        return Health(
            uptime_secs=round(self._clock() - self._started, 3),
            devices=[self._device(device) for device in self._node.devices],
            activation=self._activation.state,
            models=[
                self._traffics.of(model).load()
                for model in models.values()
                if model.status in {"loaded", "recovering"}
            ],
            draining=self.is_draining,
        )

    def discovery(self) -> Discovery:
        """Return ``GET /discovery``."""
        return Discovery(
            hostname=platform.node(),
            os=platform.system(),
            kernel=platform.release(),
            devices=[self._info(device) for device in self._node.devices],
            harnesses=HARNESSES,
            cuda_version=self._inventory.cuda_version,
            driver_version=self._inventory.driver_version,
            cuda_unavailable_reason=self._inventory.unavailable_reason,
        )

    def models(self) -> list[ModelInfo]:
        """Return ``GET /models``."""
        return [self._info_of(model) for model in self._node.models.values()]

    def _info_of(self, model: ModelView) -> ModelInfo:
        info = model_info(model)
        if self.is_draining:
            return msgspec.structs.replace(info, servable=DRAINING)
        seats = self._traffics.of(model).admission.seats if info.servable.ok else None
        if seats is not None and seats.are_full:
            servable = Servable(ok=False, reason=Overloaded.code, detail=seats.in_words)
            return msgspec.structs.replace(info, servable=servable)
        return info

    def _device(self, device: DeviceView) -> DeviceHealth:
        reading, foreign = self._readings.of(device), self._readings.foreign_use_of(device)
        return DeviceHealth(
            index=device.spec.index,
            name=device.spec.name,
            state=device.state,
            vram_used_mb=_mb(reading.used_bytes),
            vram_free_mb=_mb(reading.free_bytes),
            loadable_mb=_mb(self._node.free_bytes(device.spec.index)),
            utilization_pct=reading.utilization_pct,
            temp_c=reading.temp_c,
            lifecycle_cycles=device.cycles,
            restarts=sum(device.losses.values()),
            restarts_by_cause=dict(device.losses),
            last_failure=device.failure,
            foreign_mb=None if foreign is None else foreign.held_mb,
        )

    def _info(self, device: DeviceView) -> DeviceInfo:
        gpu = next((g for g in self._inventory.gpus if f"cuda:{g.index}" == device.spec.name), None)
        return DeviceInfo(
            index=device.spec.index,
            name=gpu.name if gpu else device.spec.name,
            vram_total_mb=device.spec.memory_bytes // MIB,
            compute_capability=gpu.compute_capability if gpu else None,
        )


def model_info(model: ModelView) -> ModelInfo:
    """Return how ``GET /models`` shows *model*."""
    text = model.text
    held = model.footprints or [Footprint(0, 0, 0)] * len(model.devices)
    return ModelInfo(
        id=model.id,
        harness="torch",
        status=model.status,
        devices=[
            ModelDevice(
                index=device.spec.index,
                weights_mb=_mb_up(footprint.weights_bytes),
                kv_mb=_mb_up(footprint.kv_bytes),
                workspace_mb=_mb_up(footprint.workspace_bytes),
            )
            for device, footprint in zip(model.devices, held, strict=True)
        ],
        servable=model.servable,
        capabilities=text.abilities if text else [],
        limit=Limit(context=model.limits.max_context_tokens) if model.limits else None,
        tool_call=text is not None and text.takes_tools,
        reasoning=text is not None and text.reasons,
        progress=model.progress,
        failure=model.failure,
        refusal=model.refusal,
    )


def capabilities(model: ModelView) -> Capabilities:
    """Return what a loaded model can do."""
    info = model_info(model)
    return Capabilities(
        capabilities=info.capabilities,
        limit=info.limit,
        tool_call=info.tool_call,
        reasoning=info.reasoning,
        size_bytes=sum(held.weights_bytes for held in model.footprints),
        source="loaded",
    )


def _mb(number: int | None) -> int | None:
    return None if number is None else number // MIB


def _mb_up(number: int) -> int:
    return -(-number // MIB)
