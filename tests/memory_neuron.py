"""A fake neuron whose devices have memory: loads take it, unloads give it back.

What does not fit is refused. It watches over itself: ``is_overcommitted`` once more was loaded than
it has, ``has_cut_off`` once a model was unloaded under its requests.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web

from cortex.ipc.errors import ApiError, Unloadable
from cortex.ipc.node_api import (
    DeviceHealth,
    DeviceInfo,
    Health,
    LoadEstimate,
    ModelDevice,
    ModelLoad,
)
from fakes import FakeModel, FakeNeuron, refusal

MIB = 2**20


class MemoryNeuron(FakeNeuron):
    """A neuron with *memory_mb* on each device, where each model takes what *takes_mb* says.

    Models of *loaded* are there from the beginning, each on the device that is the emptiest then.
    With ``estimates`` it answers ``POST /models/estimate``; of models in ``says_mb`` it shows that
    as what they hold, and ``says_free_mb`` as free. ``refuses_unload`` is its answer to unloads,
    ``may_unload`` a gate for them: those that nobody waits for any more are in
    ``unloads_left_alone``, and end with ``forget``.
    """

    def __init__(
        self,
        name: str = "a",
        memory_mb: Sequence[int] = (1000,),
        takes_mb: Mapping[str, int] | None = None,
        loaded: Sequence[str] = (),
    ) -> None:
        self.memory_mb = list(memory_mb)
        self.takes_mb = dict(takes_mb or {})
        self.held: dict[str, dict[int, int]] = {}
        self.working: Counter[str] = Counter()
        self.estimates: dict[str, LoadEstimate | Unloadable | bytes] = {}
        self.says_mb: dict[str, int] = {}
        self.says_free_mb: int | None = None
        self.refuses_unload: ApiError | None = None
        self.may_unload = asyncio.Event()
        self.may_unload.set()
        self.unloads_left_alone: list[str] = []
        self.is_overcommitted = False
        self.has_cut_off = False
        super().__init__(loaded, name)
        self.devices = [DeviceInfo(i, f"cuda:{i}", mb) for i, mb in enumerate(self.memory_mb)]
        for model in loaded:
            self._take(model, self._chosen({}))

    def free(self, device: int) -> int:
        """Return what is left of a device, in MB."""
        return self.memory_mb[device] - sum(mb.get(device, 0) for mb in self.held.values())

    def forget(self, model: str) -> None:
        """Have *model* gone."""
        del self.models[model], self.held[model]

    def _app(self) -> web.Application:
        app = super()._app()
        app.add_routes([web.post("/models/estimate", self._estimate)])
        return app

    def _chosen(self, body: Mapping[str, Any]) -> list[int]:
        count = body.get("tensor_parallel") or 1
        by_room = sorted(range(len(self.memory_mb)), key=lambda d: (-self.free(d), d))
        return body.get("devices") or by_room[:count]

    def _take(self, model: str, devices: Sequence[int]) -> None:
        share = -(-self.takes_mb.get(model, 100) // len(devices))
        self.held[model] = dict.fromkeys(devices, share)
        self.is_overcommitted |= any(self.free(device) < 0 for device in devices)

    async def _health(self, request: web.Request) -> web.Response:
        await self._polled(request)
        devices = [
            DeviceHealth(i, f"cuda:{i}", "ready", vram_free_mb=self.says_free_mb or self.free(i))
            for i in range(len(self.memory_mb))
        ]
        loads = [ModelLoad(model, in_flight=self.working[model]) for model in self.models]
        return _json(
            Health(self.uptime_seconds, devices, self.activation, loads, draining=self.draining)
        )

    async def _models(self, request: web.Request) -> web.Response:
        await super()._models(request)
        for model in [m.id for m in self.models.values() if m.status == "failed"]:
            self.held.pop(model, None)
        return _json([self._info(model) for model in self.models.values()])

    def _info(self, model: FakeModel) -> Any:
        held = self.held.get(model.id, {}) if model.status == "loaded" else {}
        devices = [
            ModelDevice(i, weights_mb=self.says_mb.get(model.id, mb)) for i, mb in held.items()
        ]
        return msgspec.structs.replace(model.info(), devices=devices)

    async def _load(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        model, devices = body["model_id"], self._chosen(body)
        if model in self.held:
            return await super()._load(request)
        share = -(-self.takes_mb.get(model, 100) // len(devices))
        room = min(self.free(device) for device in devices)
        if room < share and self.refuses_load is None:
            await self._note(request)
            return refusal(
                Unloadable(
                    f"it needs {share} MB, and {room} are free",
                    kind="insufficient_memory",
                    weights_bytes=share * MIB,
                    kv_bytes=0,
                    memory_bytes=room * MIB,
                    ranks=len(devices),
                )
            )
        if self.refuses_load is None:
            self._take(model, devices)
        return await super()._load(request)

    async def _unload(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        model = self.models.get(body["model_id"])
        if self.refuses_unload:
            await self._note(request)
            return refusal(self.refuses_unload)
        if model and not self.may_unload.is_set():
            model.status = "unloading"
            try:
                await self.may_unload.wait()
            except asyncio.CancelledError:
                self.unloads_left_alone.append(model.id)
                raise
        if model:
            model.in_flight = self.working[model.id]
            self.has_cut_off |= bool(model.in_flight and body.get("force"))
        answer = await super()._unload(request)
        if answer.status == 200:
            self.held.pop(body["model_id"])
        return answer

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        model = msgspec.json.decode(await request.read())["model"]
        self.working[model] += 1
        try:
            return await super()._infer(request)
        finally:
            self.working[model] -= 1

    async def _estimate(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        found = self.estimates.get(body["model_id"])
        if found is None:
            raise web.HTTPNotFound
        if isinstance(found, bytes):
            return web.Response(body=found)
        return refusal(found) if isinstance(found, Unloadable) else _json(found)


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
