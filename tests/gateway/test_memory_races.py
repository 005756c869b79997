"""What changes between a decision and its deed: polls are old, others act too, nodes go away."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from aiohttp import web

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Eviction, Routing
from cortex.gateway.needs import Needs
from cortex.ipc.errors import Conflict, Overloaded
from cortex.ipc.node_api import Servable
from fakes import QUICK, FakeModel, gateway_config, refusal, until
from memory_neuron import MemoryNeuron

CHAT = "/v1/chat/completions"
LOAD, UNLOAD = "/models/load", "/models/unload"
AT_ONCE = Eviction(min_dwell_seconds=0.0)
RARELY = msgspec.structs.replace(QUICK, poll_seconds=3600.0)
SIZES = {"m": 600, "n": 600, "o": 400, "x": 600}
SIZED = Catalogue({name: Profile(name, vram_mb=mb) for name, mb in SIZES.items()})


def a_gateway(*neurons: MemoryNeuron, catalogue: Catalogue = SIZED, **options: Any) -> Gateway:
    return Gateway(gateway_config(*neurons, **{"eviction": AT_ONCE, **options}), catalogue)


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, model: str
) -> tuple[int, str | None]:
    """Return the status, and the code of an error."""
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    async with session.post(gateway.url + CHAT, json=body) as response:
        said = orjson.loads(await response.read())
        return response.status, said.get("error", {}).get("code")


def waits(gateway: Gateway, model: str, why: str) -> bool:
    return any(d.target.id == model and d.why == why for d in gateway.lifecycle.loads)


async def test_who_waits_hears_of_it_when_the_node_goes_down(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.working["n"] = 1  # a request of somebody else
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: waits(gateway, "m", "waiting for n to finish on a"))
            a.is_out_of_order = True

    assert task.result() == (503, "recovering")


async def test_memory_that_another_load_is_about_to_take_spares_no_victim(
    session: aiohttp.ClientSession,
) -> None:
    sizes = {"n": 300, "m": 600, "o": 400}
    async with (
        MemoryNeuron("a", [1000], sizes, ["n"]) as a,
        a_gateway(a, timeouts=RARELY) as gateway,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(ask(session, gateway, model)) for model in ("o", "m")]

    assert [task.result()[0] for task in tasks] == [200, 200]
    assert (sorted(a.held), a.is_overcommitted) == (["m", "o"], False)


async def test_nobody_is_unloaded_for_want_of_memory_that_has_become_free(
    session: aiohttp.ClientSession,
) -> None:
    sizes = {"n": 500, "o": 400, "m": 450}
    catalogue = Catalogue({"m": Profile("m", vram_mb=450)})
    async with (
        MemoryNeuron("a", [1000], sizes, ["n", "o"]) as a,
        a_gateway(a, catalogue=catalogue, timeouts=RARELY) as gateway,
    ):
        await ask(session, gateway, "o")
        a.forget("o")
        status, _ = await ask(session, gateway, "m")

    assert (status, sorted(a.held)) == (200, ["m", "n"])


async def test_memory_that_somebody_else_has_just_taken_is_made_free(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        MemoryNeuron("a", [1000], SIZES) as a,
        a_gateway(a, timeouts=RARELY) as gateway,
    ):
        await gateway.poller.first_round()
        a.models["x"] = FakeModel("x")
        a.held["x"] = {0: 600}
        status, _ = await ask(session, gateway, "m")

    assert (status, list(a.held), a.is_overcommitted) == (200, ["m"], False)


async def test_a_node_that_wants_more_memory_than_it_can_say_is_not_asked_for_ever(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        MemoryNeuron("a", [1000], {**SIZES, "m": 600}) as a,
        a_gateway(a, timeouts=RARELY) as gateway,
    ):
        a.says_free_mb = 900
        a.held["somebody"] = {0: 700}
        status, code = await ask(session, gateway, "m")

    assert (status, code) == (422, "unloadable")
    assert len(a.requests(LOAD)) == 1


class Unloading(MemoryNeuron):
    """Refuses the first load: the model is just leaving."""

    async def _load(self, request: web.Request) -> web.Response:
        if not self.requests(LOAD):
            await self._note(request)
            return refusal(Conflict("model 'm' is being unloaded: try again when it is gone"))
        return await super()._load(request)


async def test_a_load_that_meets_an_unload_is_asked_for_again(
    session: aiohttp.ClientSession,
) -> None:
    async with Unloading("a", takes_mb=SIZES) as a, a_gateway(a) as gateway:
        status, _ = await ask(session, gateway, "m")

    assert (status, len(a.requests(LOAD))) == (200, 2)


async def test_a_model_that_is_being_unloaded_is_loaded_again_for_who_wants_it(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron("a", takes_mb=SIZES, loaded=["m"]) as a, a_gateway(a) as gateway:
        await gateway.poller.first_round()
        a.may_unload.clear()
        target = gateway.written.catalogue.target("m")
        async with asyncio.TaskGroup() as group:
            group.create_task(gateway.lifecycle.unload(target, node=None, force=False))
            await until(lambda: a.models["m"].status == "unloading")
            await gateway.poller.refresh("a")
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: gateway.door.inside == 1)
            await gateway.poller.refresh("a")
            a.may_unload.set()

    assert task.result() == (200, None)


async def test_what_an_operator_loads_is_loaded_also_when_the_first_who_asked_has_left(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            impatient = group.create_task(ask(session, gateway, "m"))
            await until(lambda: waits(gateway, "m", "waiting for n to finish on a"))
            url = gateway.url + "/fleet/models/load"
            async with session.post(url, json={"model": "m"}) as response:
                accepted = response.status
            impatient.cancel()
            await until(lambda: gateway.door.inside == 1)
            a.may_finish.set()
            await until(lambda: "m" in a.held)

    assert accepted == 202


async def test_a_retry_does_not_go_where_the_model_is_about_to_leave(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = Catalogue({**SIZED.profiles, "m": Profile("m", vram_mb=600, pinned_on=("b",))})
    async with (
        MemoryNeuron("a", takes_mb=SIZES, loaded=["n"]) as a,
        MemoryNeuron("b", takes_mb=SIZES, loaded=["n"]) as b,
        a_gateway(a, b, catalogue=catalogue) as gateway,
    ):
        b.working["n"] = 1
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(ask(session, gateway, "m"))
            await until(lambda: waits(gateway, "m", "waiting for n to finish on b"))
            a.refuses = Overloaded("full")
            refused = await ask(session, gateway, "n")
            b.working["n"] = 0

    assert (refused, waiting.result()[0]) == ((503, "overloaded"), 200)


async def test_a_node_that_cannot_be_reached_for_a_load_is_away(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron("a", takes_mb=SIZES) as a, a_gateway(a, timeouts=RARELY) as gateway:
        await gateway.poller.first_round()
        await a.stop()
        body = {"model": "m", "messages": []}
        async with session.post(gateway.url + CHAT, json=body) as response:
            code = orjson.loads(await response.read())["error"]["code"]

    assert (response.status, code, response.headers["Retry-After"]) == (503, "recovering", "3")


async def test_a_load_that_is_lost_with_its_neuron_goes_to_another_node(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        MemoryNeuron("a", [2000], SIZES) as a,
        MemoryNeuron("b", [1000], SIZES) as b,
        a_gateway(a, b) as gateway,
    ):
        await gateway.poller.first_round()
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: "m" in a.models)
            a.forget("m")
            a.uptime_seconds = 0.5

    assert (task.result()[0], list(b.held)) == (200, ["m"])


async def test_who_comes_while_a_model_is_placed_anew_waits_for_it_too(
    session: aiohttp.ClientSession,
) -> None:
    routing = Routing(breaker_failures=1, breaker_open_seconds=60.0)
    async with (
        MemoryNeuron("a", takes_mb=SIZES, loaded=["m"]) as a,
        MemoryNeuron("b", takes_mb=SIZES, loaded=["n"]) as b,
        a_gateway(a, b, timeouts=RARELY, routing=routing) as gateway,
    ):
        await gateway.poller.first_round()
        b.may_unload.clear()
        await a.stop()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask(session, gateway, "m"))
            await until(lambda: bool(b.requests(UNLOAD)) or b.models["n"].status == "unloading")
            later = group.create_task(ask(session, gateway, "m"))
            await until(lambda: gateway.door.inside == 2 or later.done())
            b.may_unload.set()

    assert (first.result()[0], later.result()[0]) == (200, 200)


async def test_a_load_that_cannot_begin_keeps_nobody_from_hearing_that_the_model_is_unservable(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["m"]) as a, a_gateway(a) as gateway:
        a.models["m"].servable = Servable(ok=False, reason="low_memory")
        await gateway.poller.refresh("a")
        url = gateway.url + "/fleet/models/load"
        async with session.post(url, json={"model": "m"}) as response:
            accepted = response.status
        answer = await ask(session, gateway, "m")

    assert (accepted, answer) == (202, (503, "recovering"))


async def test_an_unload_that_never_ends_is_given_up(session: aiohttp.ClientSession) -> None:
    timeouts = msgspec.structs.replace(QUICK, control_seconds=0.2, load_seconds=0.2)
    async with (
        MemoryNeuron(takes_mb=SIZES, loaded=["m"]) as a,
        a_gateway(a, timeouts=timeouts) as gateway,
    ):
        a.may_unload.clear()
        url = gateway.url + "/fleet/models/unload"
        async with session.post(url, json={"model": "m"}) as response:
            code = orjson.loads(await response.read())["error"]["code"]
        a.may_unload.set()

    assert (response.status, code) == (504, "node_timeout")


async def test_a_bug_while_nodes_are_asked_ends_those_who_wait_and_not_the_daemon(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def buggy(*_: object) -> None:
        raise ZeroDivisionError

    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a) as gateway:
        monkeypatch.setattr(Needs, "of", buggy)
        broken = await ask(session, gateway, "m")
        monkeypatch.undo()
        mended = await ask(session, gateway, "m")

    assert (broken, mended) == ((500, "internal_error"), (200, None))
