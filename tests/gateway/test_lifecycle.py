"""Loading on demand: once for everybody, with the stream kept alive, and with the true reason."""

import asyncio
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest

from cortex.gateway import demands, memory_queue
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.loading import Loading
from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import Servable
from fakes import QUICK, FakeModel, FakeNeuron, gateway_config, until

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
LOAD = "/models/load"
COLD = Catalogue({"m": Profile("m", quant="Q4_1"), "n": Profile("n")})
ASK: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "x"}],
}
STREAM = {**ASK, "stream": True}


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, body: dict[str, Any], path: str = CHAT
) -> tuple[int, str]:
    async with session.post(gateway.url + path, json=body) as response:
        return response.status, await response.text()


async def test_a_cold_model_is_loaded_as_its_profile_says(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron() as a,
        Gateway(gateway_config(a), COLD) as gateway,
        session.post(gateway.url + CHAT, json=ASK) as response,
    ):
        reason = response.headers["x-cortex-reason"]

    assert (response.status, reason) == (200, "loaded-on-demand")
    assert a.requests(LOAD)[0].body == {"model_id": "m", "quant": "Q4_1"}


async def test_twenty_requests_share_one_load(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(session, gateway, ASK)) for _ in range(20)]
            await until(lambda: gateway.door.inside == 20 and bool(a.requests(LOAD)))
            a.may_load.set()

    assert [task.result()[0] for task in tasks] == [200] * 20
    assert len(a.requests(LOAD)) == 1


async def test_two_models_load_side_by_side(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            for model in ("m", "n"):
                group.create_task(ask(session, gateway, {**ASK, "model": model}))
            await until(lambda: len(a.requests(LOAD)) == 2)
            a.may_load.set()


@pytest.mark.parametrize(
    ("path", "sign"),
    [(CHAT, b": loading m on a: downloading 40%\n\n"), (MESSAGES, b"event: ping\n")],
)
async def test_a_waiting_stream_is_kept_alive_in_its_dialect(
    session: aiohttp.ClientSession, path: str, sign: bytes
) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        async with session.post(gateway.url + path, json=STREAM) as response:
            so_far = b""
            while sign not in so_far:
                so_far += await response.content.readany()
            a.may_load.set()
            rest = await response.text()

    assert "Hello" in rest
    assert response.headers["x-cortex-node"] == "a"


async def test_a_load_that_fails_gives_its_reason(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.fails_load = "the disk is full"

        status, text = await ask(session, gateway, ASK)

    assert status == 502
    assert orjson.loads(text)["error"]["message"].endswith("on a: the disk is full")


async def test_a_load_that_fails_ends_a_waiting_stream_with_its_reason(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        async with session.post(gateway.url + CHAT, json=STREAM) as response:
            await response.content.readany()
            a.fails_load = "the disk is full"
            a.may_load.set()
            text = await response.text()

    assert text.endswith(
        'the disk is full","type":"server_error","param":null,"code":"node_failed"}}\n\n'
    )


async def test_a_load_that_failed_is_not_tried_again_at_once(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.fails_load = "no network"
        before = await ask(session, gateway, ASK)
        a.fails_load = None
        after = await ask(session, gateway, ASK)

    assert before[0] == after[0] == 502
    assert "no network" in after[1]
    assert len(a.requests(LOAD)) == 1


async def test_a_load_that_failed_is_tried_again_after_a_while(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "BACK_OFF_SECONDS", 0.0)
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.fails_load = "no network"
        before, _ = await ask(session, gateway, ASK)
        a.fails_load = None
        after, _ = await ask(session, gateway, ASK)

    assert (before, after) == (502, 200)


async def test_an_operator_may_try_again_at_once(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.fails_load = "no network"
        await ask(session, gateway, ASK)
        a.fails_load = None
        status, _ = await ask(session, gateway, {"model": "m", "wait": True}, "/fleet/models/load")

    assert status == 200


async def test_what_the_node_refuses_to_load_is_refused_with_its_numbers(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.refuses_load = Unloadable("needs 9 MB, 3 are free", kind="no_memory", need_mb=9)

        status, text = await ask(session, gateway, ASK)

    assert (status, orjson.loads(text)) == (422, a.refuses_load.body())


async def test_a_load_that_takes_too_long_is_given_up(session: aiohttp.ClientSession) -> None:
    timeouts = msgspec.structs.replace(QUICK, load_seconds=0.2)
    async with FakeNeuron() as a:
        a.may_load.clear()
        async with Gateway(gateway_config(a, timeouts=timeouts), COLD) as gateway:
            status, text = await ask(session, gateway, ASK)

    assert (status, orjson.loads(text)["error"]["code"]) == (504, "node_timeout")


async def test_a_load_on_a_node_that_goes_down_fails(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, ASK))
            await until(lambda: bool(a.requests(LOAD)))
            a.is_out_of_order = True

    status, text = task.result()
    assert status == 502
    assert "went down while loading" in text


async def test_a_load_that_vanishes_fails(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, ASK))
            await until(lambda: "m" in a.models)
            a.models.clear()

    assert "it is gone" in task.result()[1]


async def test_a_client_that_leaves_does_not_stop_the_load(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        response = await session.post(gateway.url + CHAT, json=STREAM)
        response.close()
        await until(lambda: gateway.door.inside == 0)
        a.may_load.set()
        await until(lambda: gateway.fleet.node("a").status_of("m") == "loaded")

    assert (len(a.requests(LOAD)), a.requests(CHAT)) == (1, [])


async def test_a_load_that_somebody_else_started_is_waited_for(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["x"]) as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        a.models["x"].status = "loading"
        await gateway.poller.refresh("a")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ask(session, gateway, {**ASK, "model": "x"}))
            await until(lambda: gateway.door.inside == 1)
            a.may_load.set()

    assert (task.result()[0], a.requests(LOAD)) == (200, [])


async def test_a_model_that_loads_but_cannot_be_served_is_503(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a), COLD) as gateway:
        a.models["m"].servable = Servable(ok=False, reason="low_memory")
        await gateway.poller.refresh("a")

        status, text = await ask(session, gateway, ASK)

    assert (status, orjson.loads(text)["error"]["code"]) == (503, "recovering")


async def test_a_model_that_does_not_stay_loaded_is_503(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(*_: object) -> None:
        return

    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        monkeypatch.setattr(Loading, "follow", at_once)

        status, text = await ask(session, gateway, ASK)

    assert (status, orjson.loads(text)["error"]["code"]) == (503, "model_loading")


async def test_the_node_with_most_free_memory_loads(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(name="a") as a, FakeNeuron(name="b") as b:
        b.free_mb = a.free_mb + 1
        async with Gateway(gateway_config(a, b), COLD) as gateway:
            await ask(session, gateway, ASK)

    assert (len(a.requests(LOAD)), len(b.requests(LOAD))) == (0, 1)


async def test_an_operator_loads_a_model_and_waits(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron(name="a") as a,
        FakeNeuron(name="b") as b,
        Gateway(gateway_config(a, b), COLD) as gateway,
    ):
        body = {"model": "m", "node": "b", "wait": True}
        status, text = await ask(session, gateway, body, "/fleet/models/load")

    assert (status, orjson.loads(text)) == (200, {"status": "loaded", "model": "m", "node": "b"})
    assert (a.requests(LOAD), len(b.requests(LOAD))) == ([], 1)


async def test_an_operator_need_not_wait(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        first = await ask(session, gateway, {"model": "m"}, "/fleet/models/load")
        again = await ask(session, gateway, {"model": "m"}, "/fleet/models/load")

    assert first == again == (202, '{"status":"loading","model":"m","node":null}')
    assert len(a.requests(LOAD)) == 1


async def test_what_is_loaded_is_not_loaded_again(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a), COLD) as gateway:
        answer = await ask(session, gateway, {"model": "m"}, "/fleet/models/load")

    assert (answer, a.requests(LOAD)) == ((200, '{"status":"loaded","model":"m","node":"a"}'), [])


async def test_an_operator_unloads_a_model_everywhere(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(["m"], "b") as b,
        Gateway(gateway_config(a, b), COLD) as gateway,
    ):
        status, text = await ask(session, gateway, {"model": "m"}, "/fleet/models/unload")
        listed = [gateway.fleet.node(name).models for name in ("a", "b")]

    assert (status, orjson.loads(text)["nodes"], listed) == (200, ["a", "b"], [(), ()])


async def test_a_busy_model_is_unloaded_by_force_only(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a), COLD) as gateway:
        a.models["m"].in_flight = 1
        body = {"model": "m", "node": "a"}
        gently, _ = await ask(session, gateway, body, "/fleet/models/unload")
        forced, _ = await ask(session, gateway, {**body, "force": True}, "/fleet/models/unload")

    assert (gently, forced) == (409, 200)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/fleet/models/load", {"model": "stranger"}, 404, "model_not_found"),
        ("/fleet/models/load", {"model": "m", "node": "x"}, 400, "invalid_request"),
        ("/fleet/models/load", {"model": "m", "quant": "x"}, 400, "invalid_request"),
        ("/fleet/models/unload", {"model": "m"}, 404, "model_not_found"),
        ("/fleet/models/unload", {}, 400, "invalid_request"),
    ],
)
async def test_an_operators_mistake_is_said(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        answered, text = await ask(session, gateway, body, path)

    assert (answered, orjson.loads(text)["error"]["code"]) == (status, code)


async def test_a_bug_in_a_load_is_an_internal_error(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def buggy(*_: object) -> None:
        raise ZeroDivisionError

    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        monkeypatch.setattr(Loading, "ask", buggy)

        status, text = await ask(session, gateway, ASK)

    assert (status, orjson.loads(text)["error"]["code"]) == (500, "internal_error")
    assert a.models == dict[str, FakeModel]()


async def test_a_bug_in_a_decision_is_an_internal_error(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: object) -> None:
        raise ZeroDivisionError

    async with FakeNeuron() as a, Gateway(gateway_config(a), COLD) as gateway:
        monkeypatch.setattr(memory_queue, "turns", buggy)
        broken, _ = await ask(session, gateway, ASK)
        monkeypatch.undo()
        mended, _ = await ask(session, gateway, ASK)

    assert (broken, mended) == (500, 200)
