"""Models that do not fit beside each other, over HTTP: who is loaded where, and who makes room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Eviction
from cortex.gateway.demands import Demand
from cortex.ipc.errors import Conflict, LoadedDifferently, ModelNotFound, Recovering, Unloadable
from cortex.ipc.node_api import LoadEstimate, Refusal
from fakes import QUICK, FakeModel, Received, gateway_config, until
from memory_neuron import MemoryNeuron

CHAT = "/v1/chat/completions"
LOAD, UNLOAD = "/models/load", "/models/unload"
AT_ONCE = Eviction(min_dwell_seconds=0.0)
SIZES = {"m": 600, "n": 600, "o": 600, "small": 100}


def profiles(*models: Profile) -> Catalogue:
    named = {name: Profile(name) for name in SIZES}
    return Catalogue(named | {profile.id: profile for profile in models})


def a_gateway(
    *neurons: MemoryNeuron, catalogue: Catalogue | None = None, **options: Any
) -> Gateway:
    config = gateway_config(*neurons, **{"eviction": AT_ONCE, **options})
    return Gateway(config, catalogue or profiles())


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, model: str, **body: Any
) -> tuple[int, str]:
    asked = {"model": model, "messages": [{"role": "user", "content": "x"}], **body}
    async with session.post(gateway.url + CHAT, json=asked) as response:
        return response.status, await response.text()


def code(text: str) -> str:
    return str(orjson.loads(text)["error"]["code"])


def control(neuron: MemoryNeuron) -> list[tuple[str, str]]:
    """Return what the neuron was told: loads and unloads, in order."""
    told = {LOAD: "load", UNLOAD: "unload"}
    return [(told[r.path], r.body["model_id"]) for r in neuron.received if r.path in told]


def bodies(received: Sequence[Received]) -> list[dict[str, Any]]:
    return [request.body for request in received]


async def test_an_idle_model_makes_room(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        status, _ = await ask(session, gateway, "m")

    assert status == 200
    assert ("unload", "n") in control(a)
    assert list(a.held) == ["m"]
    assert not a.is_overcommitted


async def test_what_a_node_refuses_for_want_of_memory_is_learnt(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        await ask(session, gateway, "m")

    assert control(a) == [("load", "m"), ("unload", "n"), ("load", "m")]


async def test_a_nodes_estimate_spares_the_attempt(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.estimates["m"] = LoadEstimate(least_mb=600, wanted_mb=600)
        await ask(session, gateway, "m")

    assert control(a) == [("unload", "n"), ("load", "m")]


async def test_a_profiles_size_counts_where_nobody_knows_better(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = profiles(Profile("m", vram_mb=600))
    async with (
        MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
    ):
        await ask(session, gateway, "m")

    assert control(a) == [("unload", "n"), ("load", "m")]


async def test_what_was_measured_is_known_after_a_restart(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    state = tmp_path / "cortex.db"
    async with MemoryNeuron(takes_mb=SIZES, loaded=["m"]) as a:
        async with Gateway(gateway_config(a), profiles(), state=state) as gateway:
            await until(lambda: gateway.fleet.node("a").discovery is not None)
        a.models.pop("m")
        a.held.pop("m")
        async with Gateway(gateway_config(a), profiles(), state=state) as gateway:
            target = gateway.written.catalogue.target("m")
            view = await gateway.lifecycle.placement(target)

    assert (view.needs_mb, view.source, view.chosen) == (600, "measured", "a")


async def test_nothing_is_evicted_where_another_node_has_room(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        MemoryNeuron("a", takes_mb=SIZES, loaded=["n"]) as a,
        MemoryNeuron("b", [700], takes_mb=SIZES) as b,
        a_gateway(a, b) as gateway,
    ):
        await ask(session, gateway, "m")

    assert (control(a), control(b)) == ([], [("load", "m")])


async def test_a_group_of_devices_is_loaded_without_evicting(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = profiles(Profile("wide", tensor_parallel=2, vram_mb=840))
    async with (
        MemoryNeuron("a", [600, 600, 600], {"n": 500, "wide": 840}, ["n"]) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
    ):
        status, _ = await ask(session, gateway, "wide")

    assert (status, control(a)) == (200, [("load", "wide")])
    assert a.requests(LOAD)[0].body["devices"] == [1, 2]


async def test_a_load_that_fails_for_want_of_memory_later_goes_to_another_node(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        MemoryNeuron("a", [2000], takes_mb=SIZES) as a,
        MemoryNeuron("b", [700], takes_mb=SIZES) as b,
        a_gateway(a, b) as gateway,
    ):
        a.fails_load = "there is no room"
        a.fails_load_with = Refusal("insufficient_memory", {"weights_bytes": 300 << 20})
        status, _ = await ask(session, gateway, "m")

    assert (status, set(control(a)), control(b)) == (200, {("load", "m")}, [("load", "m")])


async def test_a_group_that_crosses_another_replaces_it(
    session: aiohttp.ClientSession,
) -> None:
    sizes = {"pair": 200, "wide": 300}
    catalogue = profiles(
        Profile("pair", devices=[0, 1], vram_mb=200), Profile("wide", devices=[0, 1, 2])
    )
    async with MemoryNeuron("a", [600] * 3, sizes) as a, a_gateway(a, catalogue=catalogue) as g:
        await ask(session, g, "pair")
        a.estimates["wide"] = LoadEstimate(least_mb=300, wanted_mb=300)
        status, _ = await ask(session, g, "wide")

    assert (status, control(a)) == (200, [("load", "pair"), ("unload", "pair"), ("load", "wide")])


async def test_only_as_much_is_unloaded_as_is_needed(session: aiohttp.ClientSession) -> None:
    sizes = {"small": 100, "n": 500, "o": 300, "m": 500}
    catalogue = profiles(Profile("m", vram_mb=500))
    async with (
        MemoryNeuron("a", [1000], sizes, ["small", "n", "o"]) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
    ):
        await ask(session, gateway, "small")
        await ask(session, gateway, "o")
        await ask(session, gateway, "m")

    assert control(a) == [("unload", "n"), ("load", "m")]


async def test_a_busy_model_finishes_before_it_goes(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            waiting = group.create_task(ask(session, gateway, "m"))
            await until(lambda: _why(gateway, "m") == "waiting for n to finish on a")
            assert not a.requests(UNLOAD)
            a.may_finish.set()

    assert (running.result()[0], waiting.result()[0], a.has_cut_off) == (200, 200, False)
    assert control(a)[-2:] == [("unload", "n"), ("load", "m")]


def _why(gateway: Gateway, model: str) -> str | None:
    return next((d.why for d in gateway.lifecycle.loads if d.target.id == model), None)


async def test_new_requests_for_a_closing_model_have_their_turn_later(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(session, gateway, "n"))]
            await a.answering.wait()
            tasks.append(group.create_task(ask(session, gateway, "m")))
            await until(lambda: _why(gateway, "m") == "waiting for n to finish on a")
            tasks.extend(group.create_task(ask(session, gateway, "n")) for _ in range(3))
            await until(lambda: len(gateway.lifecycle.loads) == 2)
            a.may_finish.set()

    served = [request.body["model"] for request in a.requests(CHAT)]
    assert [task.result()[0] for task in tasks] == [200] * 5
    assert served == ["n", "m", "n", "n", "n"]
    assert control(a)[-4:] == [("unload", "n"), ("load", "m"), ("unload", "m"), ("load", "n")]


async def test_models_that_alternate_are_swapped_in_turns_not_per_request(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = profiles(*(Profile(name, vram_mb=600) for name in "mno"))
    async with (
        MemoryNeuron(takes_mb=SIZES) as a,
        a_gateway(a, catalogue=catalogue, eviction=Eviction(min_dwell_seconds=0.3)) as gateway,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(ask(session, gateway, "mno"[i % 3])) for i in range(60)]

    assert {task.result()[0] for task in tasks} == {200}
    assert [told for told, _ in control(a)].count("load") == 3
    assert not a.is_overcommitted


async def test_a_model_is_not_displaced_within_its_dwell(session: aiohttp.ClientSession) -> None:
    async with (
        MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a,
        a_gateway(a, eviction=Eviction(min_dwell_seconds=60.0)) as gateway,
    ):
        a.estimates["m"] = LoadEstimate(least_mb=600)
        patience = msgspec.structs.replace(QUICK, load_wait_seconds=0.2)
        gateway.written.config = msgspec.structs.replace(gateway.written.config, timeouts=patience)
        status, text = await ask(session, gateway, "m")

    assert (status, code(text), control(a)) == (503, "model_loading", [])
    assert "waiting for the turn of n on a" in text


async def test_who_has_waited_long_enough_is_told_when_to_come_back(
    session: aiohttp.ClientSession,
) -> None:
    timeouts = msgspec.structs.replace(QUICK, load_wait_seconds=0.1)
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a, timeouts=timeouts) as gateway:
        a.may_load.clear()
        status, text = await ask(session, gateway, "m")
        a.may_load.set()
        await until(lambda: not gateway.lifecycle.loads)

    error = orjson.loads(text)["error"]
    assert (status, error["code"], error["progress"]) == (
        503,
        "model_loading",
        "loading m on a: downloading 40%",
    )
    assert list(a.held) == ["m"]


async def test_a_stream_is_told_what_it_waits_for(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            body = {"model": "m", "messages": [], "stream": True}
            async with session.post(gateway.url + CHAT, json=body) as response:
                said = b""
                while b": loading m: waiting for n to finish on a\n\n" not in said:
                    said += await response.content.readany()
                a.may_finish.set()
                rest = await response.text()

    assert "Hello" in rest


async def test_a_demand_that_nobody_waits_for_is_dropped(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            impatient = group.create_task(ask(session, gateway, "m"))
            await until(lambda: _why(gateway, "m") == "waiting for n to finish on a")
            impatient.cancel()
            await until(lambda: not gateway.lifecycle.loads)
            later = group.create_task(ask(session, gateway, "n"))
            await until(lambda: a.working["n"] == 2)
            a.may_finish.set()

    assert (running.result()[0], later.result()[0], a.requests(UNLOAD)) == (200, 200, [])


async def test_a_model_that_was_closed_in_vain_serves_again(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            impatient = group.create_task(ask(session, gateway, "m"))
            await until(lambda: _why(gateway, "m") == "waiting for n to finish on a")
            second = group.create_task(ask(session, gateway, "n"))
            await until(lambda: len(gateway.lifecycle.loads) == 2)
            impatient.cancel()
            await until(lambda: a.working["n"] == 2)
            a.may_finish.set()

    assert (first.result()[0], second.result()[0], a.requests(UNLOAD)) == (200, 200, [])


async def test_a_pinned_model_stays_and_the_refusal_has_the_numbers(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        gateway.fleet.pinned.add(("a", "n"))
        status, text = await ask(session, gateway, "m")

    assert (status, code(text)) == (503, "overloaded")
    assert "600 MB (estimate) of 400 MB free; n stays (pinned)" in text
    assert a.requests(UNLOAD) == []


async def test_a_higher_class_stays(session: aiohttp.ClientSession) -> None:
    catalogue = profiles(Profile("n", residency_priority=200))
    async with (
        MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
    ):
        status, text = await ask(session, gateway, "m")

    assert (status, code(text), a.requests(UNLOAD)) == (503, "overloaded", [])


async def test_models_swap_back_and_forth_when_their_class_is_the_same(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a) as gateway:
        statuses = [(await ask(session, gateway, model))[0] for model in "mnmn"]

    assert (statuses, list(a.held)) == ([200] * 4, ["n"])


async def test_nobody_who_could_ever_hold_it_is_404(session: aiohttp.ClientSession) -> None:
    catalogue = profiles(Profile("m", vram_mb=5000))
    async with (
        MemoryNeuron(takes_mb=SIZES) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
        session.post(gateway.url + CHAT, json={"model": "m", "messages": []}) as response,
    ):
        text = await response.text()

    assert (response.status, code(text)) == (404, "model_not_found")
    assert "Retry-After" not in response.headers
    assert a.requests(LOAD) == []


async def test_where_the_only_feasible_node_is_down_it_is_503(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = profiles(Profile("m", pinned_on=("a",)))
    async with (
        MemoryNeuron("a", takes_mb=SIZES) as a,
        MemoryNeuron("b", takes_mb=SIZES) as b,
        a_gateway(a, b, catalogue=catalogue) as gateway,
    ):
        await gateway.poller.first_round()
        a.is_out_of_order = True
        await until(lambda: not gateway.fleet.node("a").is_healthy)
        body = {"model": "m", "messages": []}
        async with session.post(gateway.url + CHAT, json=body) as response:
            text = await response.text()

    assert (response.status, code(text)) == (503, "recovering")
    assert response.headers["Retry-After"] == "3"
    assert b.requests(LOAD) == []


async def test_a_node_that_dies_during_a_load_hands_it_on(session: aiohttp.ClientSession) -> None:
    async with (
        MemoryNeuron("a", [2000], SIZES) as a,
        MemoryNeuron("b", [1000], SIZES) as b,
        a_gateway(a, b) as gateway,
    ):
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: bool(a.requests(LOAD)))
            a.is_out_of_order = True

    assert task.result()[0] == 200
    assert list(b.held) == ["m"]


async def test_a_node_that_refuses_a_load_now_hands_it_on(session: aiohttp.ClientSession) -> None:
    async with (
        MemoryNeuron("a", [2000], SIZES) as a,
        MemoryNeuron("b", [1000], SIZES) as b,
        a_gateway(a, b) as gateway,
    ):
        a.refuses_load = Recovering("the device restarts")
        status, _ = await ask(session, gateway, "m")

    assert (status, list(b.held), len(a.requests(LOAD))) == (200, ["m"], 1)


async def test_where_every_node_refuses_the_reason_is_the_last_ones(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron("a", takes_mb=SIZES) as a, a_gateway(a) as gateway:
        a.refuses_load = Recovering("the device restarts")
        status, text = await ask(session, gateway, "m")

    assert (status, code(text)) == (503, "recovering")
    assert "the device restarts" in text


async def test_an_estimate_that_says_it_cannot_work_is_the_answer(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a) as gateway:
        a.estimates["m"] = Unloadable("there is no Q9", kind="quant_not_found")
        status, text = await ask(session, gateway, "m")

    assert (status, orjson.loads(text)["error"]["kind"]) == (422, "quant_not_found")
    assert a.requests(LOAD) == []


async def test_a_model_that_is_loaded_differently_serves_as_it_is(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a) as gateway:
        await gateway.poller.first_round()
        a.may_poll.clear()
        a.refuses_load = LoadedDifferently("another quant")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: bool(a.requests(LOAD)))
            a.models["m"] = FakeModel("m")
            a.may_poll.set()

    assert task.result()[0] == 200


async def test_loads_on_two_devices_run_side_by_side(session: aiohttp.ClientSession) -> None:
    catalogue = profiles(Profile("m", vram_mb=600), Profile("n", vram_mb=600))
    async with (
        MemoryNeuron("a", [700, 700], SIZES) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
    ):
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            for model in ("m", "n"):
                group.create_task(ask(session, gateway, model))
            await until(lambda: len(a.requests(LOAD)) == 2)
            a.may_load.set()

    assert sorted(body["devices"] for body in bodies(a.requests(LOAD))) == [[0], [1]]
    assert not a.is_overcommitted


async def test_evictions_and_loads_are_counted(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        await ask(session, gateway, "m")
        text = (await gateway.metrics.exposition()).decode()

    assert 'cortex_evictions_total{model="n",node="a",reason="displaced"} 1.0' in text
    assert 'cortex_model_load_seconds_count{model="m",node="a"} 1.0' in text
    assert 'cortex_model_load_errors_total{code="unloadable",model="m",node="a"} 1.0' in text


async def test_an_operators_load_waits_for_its_turn_too(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            url = gateway.url + "/fleet/models/load"
            async with session.post(url, json={"model": "m"}) as response:
                accepted = response.status
            await until(lambda: _why(gateway, "m") == "waiting for n to finish on a")
            a.may_finish.set()
            await until(lambda: "m" in a.held)

    assert accepted == 202


async def _squeezed(a: MemoryNeuron, state: Path) -> None:
    """Have a gateway measure m at more than its device has."""
    a.says_mb["m"] = 1002
    async with Gateway(gateway_config(a), profiles(), state=state) as gateway:
        await until(lambda: gateway.fleet.node("a").discovery is not None)
    a.forget("m")


@pytest.mark.parametrize("can_estimate", [True, False])
async def test_an_operator_may_load_again_what_was_squeezed_into_a_device(
    session: aiohttp.ClientSession, tmp_path: Path, *, can_estimate: bool
) -> None:
    state = tmp_path / "cortex.db"
    async with MemoryNeuron(takes_mb=SIZES, loaded=["m"]) as a:
        await _squeezed(a, state)
        if can_estimate:
            a.estimates["m"] = LoadEstimate(least_mb=200, wanted_mb=2000)
        async with Gateway(gateway_config(a), profiles(), state=state) as gateway:
            url = gateway.url + "/fleet/models/load"
            async with session.post(url, json={"model": "m", "wait": True}) as response:
                text = await response.text()

    assert (response.status, list(a.held)) == (200, ["m"]), text


async def test_a_load_that_waits_for_its_turn_is_taken_back(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(session, gateway, "n"))
            await a.answering.wait()
            waiting = group.create_task(ask(session, gateway, "m"))
            await until(lambda: _why(gateway, "m") == "waiting for n to finish on a")
            url = gateway.url + "/fleet/models/unload"
            async with session.post(url, json={"model": "m", "node": "a"}) as elsewhere:
                pass
            async with session.post(url, json={"model": "m"}) as response:
                gone = await response.json()
            status, text = await waiting
            a.may_finish.set()
        again, _ = await ask(session, gateway, "n")

    assert (elsewhere.status, response.status, gone["nodes"]) == (404, 200, [])
    assert (status, orjson.loads(text)["error"]["message"]) == (
        409,
        "the load of 'm' was taken back by an operator",
    )
    assert (again, list(a.held)) == (200, ["n"])


async def test_what_a_node_has_said_that_it_cannot_hold_is_not_offered(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a) as gateway:
        a.estimates["m"] = LoadEstimate(least_mb=1200, wanted_mb=1300)
        status, _ = await ask(session, gateway, "m")
        async with session.get(gateway.url + "/v1/models") as response:
            offered = [entry["id"] for entry in (await response.json())["data"]]

    assert (status, offered) == (404, ["n", "o", "small"])


async def test_a_placement_says_where_a_model_is_loaded(session: aiohttp.ClientSession) -> None:
    async with (
        MemoryNeuron("a", takes_mb=SIZES, loaded=["m"]) as a,
        MemoryNeuron("b") as b,
        a_gateway(a, b) as gateway,
    ):
        a.estimates["m"] = LoadEstimate(least_mb=200, wanted_mb=900)
        view = await gateway.lifecycle.placement(gateway.written.catalogue.target("m"))

    numbers = [(c.needs_mb, c.source, c.least_mb, c.least_source) for c in view.candidates]
    assert view.loaded_on == ("a",)
    assert (600, "measured", 200, "estimate") in numbers


async def test_a_preload_displaces_nobody(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        await gateway.poller.first_round()
        a.estimates["m"] = LoadEstimate(least_mb=600)
        target = gateway.written.catalogue.target("m")
        load = gateway.lifecycle.load_unless_loaded(target, node=None, may_evict=False)
        assert load is not None
        with pytest.raises(Exception, match="there is no room for 'm' now"):
            await gateway.lifecycle.wait(load)

    assert control(a) == []


async def test_who_needs_a_model_that_is_preloaded_may_displace_for_it(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        await gateway.poller.first_round()
        a.estimates["m"] = LoadEstimate(least_mb=600)
        target = gateway.written.catalogue.target("m")
        gateway.lifecycle.load_unless_loaded(target, node=None, may_evict=False)
        status, _ = await ask(session, gateway, "m")

    assert (status, list(a.held)) == (200, ["m"])


async def test_a_model_whose_waiters_are_slow_to_hear_of_it_is_not_displaced_before(
    session: aiohttp.ClientSession,
) -> None:
    is_slow, may_hear = asyncio.Event(), asyncio.Event()

    async def slow(_: Demand) -> None:
        is_slow.set()
        await may_hear.wait()

    catalogue = profiles(Profile("n", vram_mb=600))
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a, catalogue=catalogue) as gateway:
        a.may_load.clear()
        target = gateway.written.catalogue.target("m")
        async with asyncio.TaskGroup() as group:
            ready = group.create_task(gateway.lifecycle.ready(target, heartbeat=slow))
            await is_slow.wait()
            group.create_task(ask(session, gateway, "n"))
            a.may_load.set()
            await until(lambda: _why(gateway, "n") == "waiting for m to finish on a")
            may_hear.set()

    assert ready.result().reason == "loaded-on-demand"
    assert control(a) == [("load", "m"), ("unload", "m"), ("load", "n")]


async def test_a_model_in_no_catalogue_that_makes_room_says_so(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        MemoryNeuron(takes_mb={**SIZES, "x": 600}, loaded=["x"]) as a,
        a_gateway(a) as gateway,
    ):
        a.may_finish.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(session, gateway, "x"))
            await a.answering.wait()
            group.create_task(ask(session, gateway, "m"))
            await until(lambda: _why(gateway, "m") == "waiting for x to finish on a")
            status, text = await ask(session, gateway, "x")
            a.may_finish.set()

    assert (status, code(text)) == (503, "overloaded")


async def test_a_model_that_never_lets_go_is_given_up_on(session: aiohttp.ClientSession) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.refuses_unload = Conflict("1 requests run on model 'n'")
        status, text = await ask(session, gateway, "m")

    assert (status, code(text)) == (503, "overloaded")
    assert "1 requests run on model 'n'" in text
    assert len(a.requests(UNLOAD)) < 10


async def test_after_each_unload_the_free_memory_is_looked_at(
    session: aiohttp.ClientSession,
) -> None:
    sizes = {"n": 400, "o": 400, "m": 550}
    catalogue = profiles(Profile("m", vram_mb=550))
    async with (
        MemoryNeuron("a", [1000], sizes, ["n", "o"]) as a,
        a_gateway(a, catalogue=catalogue) as gateway,
    ):
        a.says_mb = {"n": 200, "o": 200}
        await ask(session, gateway, "o")
        await ask(session, gateway, "m")

    assert control(a) == [("unload", "n"), ("load", "m")]


async def test_a_slow_unload_is_waited_for(session: aiohttp.ClientSession) -> None:
    timeouts = msgspec.structs.replace(QUICK, control_seconds=0.3)
    async with (
        MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a,
        a_gateway(a, timeouts=timeouts) as gateway,
    ):
        a.may_unload.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: bool(a.unloads_left_alone))
            a.may_unload.set()
            a.forget("n")

    assert (task.result()[0], list(a.held)) == (200, ["m"])


async def test_an_unload_that_the_node_does_not_begin_hands_the_load_on(
    session: aiohttp.ClientSession,
) -> None:
    timeouts = msgspec.structs.replace(QUICK, control_seconds=0.3)
    catalogue = profiles(Profile("m", vram_mb=600))
    async with (
        MemoryNeuron("a", takes_mb=SIZES, loaded=["n"]) as a,
        MemoryNeuron("b", takes_mb=SIZES, loaded=["o"]) as b,
        a_gateway(a, b, catalogue=catalogue, timeouts=timeouts) as gateway,
    ):
        a.may_unload.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, "m"))
            await until(lambda: bool(a.unloads_left_alone))
            a.models["n"].status = "loaded"

    assert (task.result()[0], list(b.held)) == (200, ["m"])


async def test_a_model_that_is_gone_already_needs_no_unload(
    session: aiohttp.ClientSession,
) -> None:
    async with MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a, a_gateway(a) as gateway:
        a.refuses_unload = ModelNotFound("not loaded")
        a.takes_mb["m"] = 300
        a.estimates["m"] = LoadEstimate(least_mb=600)
        status, _ = await ask(session, gateway, "m")

    assert (status, sorted(a.held)) == (200, ["m", "n"])


async def test_whatever_is_asked_everything_is_answered_and_nothing_breaks(
    session: aiohttp.ClientSession,
) -> None:
    sizes = {"m": 600, "n": 500, "o": 400, "small": 100, "wide": 1500}
    catalogue = profiles(
        *(Profile(name, vram_mb=mb) for name, mb in sizes.items() if name != "wide"),
        Profile("wide", vram_mb=1500, tensor_parallel=2),
    )
    names = sorted(sizes)
    async with (
        MemoryNeuron("a", [800, 800], sizes) as a,
        MemoryNeuron("b", [700], sizes) as b,
        a_gateway(a, b, catalogue=catalogue, eviction=Eviction(min_dwell_seconds=0.1)) as gateway,
        asyncio.TaskGroup() as group,
    ):
        tasks = []
        for number in range(150):
            name = names[number * 7 % len(names)]
            tasks.append(group.create_task(ask(session, gateway, name, stream=number % 3 == 0)))
            await asyncio.sleep(0.002 * (number % 4))

    assert {task.result()[0] for task in tasks} == {200}
    assert not any(neuron.is_overcommitted or neuron.has_cut_off for neuron in (a, b))
    assert gateway.lifecycle.loads == []


async def test_a_turn_that_never_comes_is_not_waited_for_for_ever(
    session: aiohttp.ClientSession,
) -> None:
    timeouts = msgspec.structs.replace(QUICK, load_seconds=0.3)
    async with (
        MemoryNeuron(takes_mb=SIZES, loaded=["n"]) as a,
        a_gateway(a, timeouts=timeouts) as gateway,
    ):
        a.estimates["m"] = LoadEstimate(least_mb=600)
        a.working["n"] = 1  # a request that has leaked, say
        status, text = await ask(session, gateway, "m")

    assert (status, code(text), control(a)) == (503, "overloaded", [])
    assert "waiting for n to finish on a, for 0 s now" in text


@pytest.mark.parametrize("said", [b'"about half of it"', b'{"why": ' + b"[" * 99_999], ids=len)
async def test_an_estimate_that_cannot_be_read_is_none(
    session: aiohttp.ClientSession, said: bytes
) -> None:
    async with MemoryNeuron(takes_mb=SIZES) as a, a_gateway(a) as gateway:
        a.estimates["m"] = said
        status, _ = await ask(session, gateway, "m")

    assert status == 200
