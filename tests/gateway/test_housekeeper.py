"""What the gateway does by itself, done: against fake neurons, told once each."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from structlog.typing import EventDict

from cortex.gateway import housekeeper
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Eviction
from cortex.ipc.errors import Conflict, Unloadable
from fakes import FakeNeuron, gateway_config, until

CHAT = "/v1/chat/completions"
LOAD = "/models/load"
UNLOAD = "/models/unload"
RESTART = "/devices/0/restart"
AT_ONCE = Eviction(idle_unload_seconds=0.01)
AWAY = Catalogue({"m": Profile("m", preload=True)})


@asynccontextmanager
async def gateway_of(
    *neurons: FakeNeuron, catalogue: Catalogue | None = None, **options: Any
) -> AsyncIterator[Gateway]:
    config = gateway_config(*neurons, **options)
    async with Gateway(config, catalogue or Catalogue()) as gateway:
        await gateway.poller.first_round()
        yield gateway


async def rounds(gateway: Gateway, count: int = 3) -> None:
    """Return after so many polls of node a, and as many looks of the housekeeper or more."""
    for _ in range(count):
        await gateway.poller.refresh("a")
        gateway.housekeeper._look()


def told(logged: list[EventDict], event: str) -> list[EventDict]:
    return [entry for entry in logged if entry["event"] == event]


async def test_an_idle_model_is_unloaded_and_that_is_told_once(logged: list[EventDict]) -> None:
    async with FakeNeuron(["m"]) as a, gateway_of(a, eviction=AT_ONCE) as gateway:
        await until(lambda: not a.models)
        await rounds(gateway)

    (said,) = told(logged, "model unloaded")
    assert (said["model"], said["node"], said["reason"]) == ("m", "a", "idle")
    assert a.requests(UNLOAD)[0].body["force"] is False


async def test_an_idle_model_goes_under_its_own_name_whatever_an_alias_makes_of_it() -> None:
    catalogue = Catalogue({"n": Profile("n", idle_unload_seconds=3600.0)}, {"m": "n"})
    async with FakeNeuron(["m", "n"]) as a, gateway_of(a, catalogue=catalogue, eviction=AT_ONCE):
        await until(lambda: len(a.models) == 1)

    assert list(a.models) == ["n"]


async def test_a_request_may_say_that_its_model_goes_right_after_it() -> None:
    async with (
        FakeNeuron(["m"]) as a,
        gateway_of(a) as gateway,
        aiohttp.ClientSession() as session,
    ):
        body = {"model": "m", "messages": [], "keep_alive": 0}
        async with session.post(gateway.url + CHAT, json=body) as response:
            status = response.status
        await until(lambda: not a.models)

    assert status == 200


async def test_a_model_that_turns_out_busy_stays_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, logged: list[EventDict]
) -> None:
    class Secretive(FakeNeuron):
        """Says nothing of the requests that others have sent it."""

        async def _unload(self, request: Any) -> Any:
            self.models["m"].in_flight = int(self.is_busy)
            try:
                return await super()._unload(request)
            finally:
                for model in self.models.values():
                    model.in_flight = 0

        is_busy = True

    monkeypatch.setattr(housekeeper, "RETRY_SECONDS", 0.0)
    async with Secretive(["m"]) as a, gateway_of(a, eviction=AT_ONCE):
        await until(lambda: len(a.requests(UNLOAD)) >= 3)
        assert "m" in a.models
        a.is_busy = False
        await until(lambda: not a.models)

    (said,) = told(logged, "housekeeping failed")
    assert (said["act"], said["why"]) == ("unload m from a (idle)", "requests are running")


async def test_an_act_that_failed_is_let_rest(logged: list[EventDict]) -> None:
    async with FakeNeuron() as a:
        a.cycles, a.refuses_restart = 50, Conflict("a load is on its way")
        async with gateway_of(a) as gateway:
            await until(lambda: bool(told(logged, "housekeeping failed")))
            await rounds(gateway)

    assert len(a.requests(RESTART)) == 1


async def test_a_worn_device_is_restarted_and_that_is_told_once(logged: list[EventDict]) -> None:
    async with FakeNeuron() as a:
        a.cycles = 50
        async with gateway_of(a) as gateway:
            await until(lambda: bool(told(logged, "idle device restarted")))
            await rounds(gateway)

    (said,) = told(logged, "idle device restarted")
    assert (said["node"], said["device"], said["cycles"], a.cycles) == ("a", 0, 50, 0)
    assert len(a.requests(RESTART)) == 1


async def test_a_model_is_preloaded_at_the_start() -> None:
    async with FakeNeuron() as a, gateway_of(a, catalogue=AWAY):
        await until(lambda: bool(a.models) and a.models["m"].status == "loaded")

    assert len(a.requests(LOAD)) == 1


async def test_a_model_is_preloaded_when_its_node_comes_up() -> None:
    async with FakeNeuron() as a:
        a.is_out_of_order = True
        async with gateway_of(a, catalogue=AWAY) as gateway:
            await rounds(gateway)
            assert a.requests(LOAD) == []
            a.is_out_of_order = False
            await until(lambda: bool(a.models))


async def test_a_preload_evicts_nobody(logged: list[EventDict]) -> None:
    catalogue = Catalogue({"m": Profile("m", preload=True, vram_mb=500)})
    async with FakeNeuron(["old"]) as a:
        a.free_mb = 450
        async with gateway_of(a, catalogue=catalogue) as gateway:
            await until(lambda: bool(told(logged, "housekeeping failed")))
            await rounds(gateway)

    (said,) = told(logged, "housekeeping failed")
    assert said["act"] == "preload m"
    assert "there is no room for 'm' now" in said["why"]
    assert (list(a.models), a.requests(LOAD)) == (["old"], [])


async def test_a_preload_that_the_node_refuses_is_told(logged: list[EventDict]) -> None:
    async with FakeNeuron() as a:
        a.refuses_load = Unloadable("it is in no format that I read", kind="unsupported")
        async with gateway_of(a, catalogue=AWAY):
            await until(lambda: bool(told(logged, "housekeeping failed")))


async def test_what_somebody_loads_already_is_not_preloaded_a_second_time() -> None:
    async with FakeNeuron() as a, gateway_of(a) as gateway:
        a.may_load.clear()
        gateway.written.catalogue = AWAY
        target = AWAY.target("m")
        gateway.lifecycle.load_unless_loaded(target, node=None)
        await rounds(gateway)
        a.may_load.set()
        await until(lambda: bool(a.models) and a.models["m"].status == "loaded")

    assert len(a.requests(LOAD)) == 1


async def test_a_bug_in_an_act_does_not_end_the_daemon(
    monkeypatch: pytest.MonkeyPatch, logged: list[EventDict]
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    async with FakeNeuron(["m"]) as a, gateway_of(a, eviction=AT_ONCE) as gateway:
        monkeypatch.setattr(gateway.lifecycle, "unload", broken)
        await until(lambda: bool(told(logged, "housekeeping broke")))
        await rounds(gateway)

    assert told(logged, "housekeeping broke")[0]["act"] == "unload m from a (idle)"
