"""Nodes that cannot: another one answers, once and whole, or the best of their refusals does."""

import asyncio
import re
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from aiohttp import web

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Routing
from cortex.ipc.errors import ApiError, ContextLengthExceeded, Overloaded, RateLimitExceeded
from fakes import QUICK, FakeModel, FakeNeuron, gateway_config, until

CHAT, MESSAGES, TEXT = "/v1/chat/completions", "/v1/messages", "/v1/completions"
RESPONSES = "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    TEXT: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
}
PATHS = pytest.mark.parametrize("path", BODIES)
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
RARELY = msgspec.structs.replace(QUICK, poll_seconds=3600)
OWN_TO_AN_ANSWER = re.compile(rb'(msg|resp)_\w+|"(created|completed)_at":[\d.]+')


class Torn(FakeNeuron):
    """Breaks the connection in the middle of an answer that does not stream."""

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        await self._note(request)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = 1000
        await response.prepare(request)
        await response.write(b'{"choices": [{"message": {"content": "Hel')
        assert request.transport is not None
        request.transport.close()
        return response


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, path: str = CHAT, **fields: Any
) -> tuple[int, bytes, dict[str, str]]:
    headers = fields.pop("headers", None)
    body = {"model": "m", **BODIES[path], **fields}
    async with session.post(gateway.url + path, json=body, headers=headers) as response:
        return response.status, await response.read(), dict(response.headers)


def breaks(node: FakeNeuron) -> None:
    node.breaks = True


def refuses(node: FakeNeuron) -> None:
    node.refuses = Overloaded("full", retry_after_seconds=2)


def is_limited(node: FakeNeuron) -> None:
    node.refuses = RateLimitExceeded("too many")


async def counted(session: aiohttp.ClientSession, gateway: Gateway, name: str) -> dict[str, float]:
    """Return the values of the metric *name*, by its labels."""
    async with session.get(gateway.metrics_url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    found = [line.removeprefix(name).split(" ") for line in lines if line.startswith(name + "{")]
    return {labels: float(value) for labels, value in found}


@PATHS
@STREAMS
@pytest.mark.parametrize("cannot", [breaks, refuses, is_limited])
async def test_a_retried_request_is_answered_as_if_nothing_had_been(
    session: aiohttp.ClientSession, *, path: str, stream: bool, cannot: Any
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        async with Gateway(gateway_config(b)) as alone:
            expected = await ask(session, alone, path, stream=stream)
        b.received.clear()
        cannot(a)
        b.models["m"].in_flight = 50  # so that the other one is asked first
        async with Gateway(gateway_config(a, b)) as gateway:
            status, said, headers = await ask(session, gateway, path, stream=stream)
            tokens = await counted(session, gateway, "cortex_completion_tokens_total")
            requests = await counted(session, gateway, "cortex_requests_total")

    assert (status, bare(said)) == (200, bare(expected[1]))
    assert (headers["x-cortex-node"], headers["x-cortex-reason"]) == ("b", "retried")
    asked = [[r.body for r in n.received if r.path != "/tokenize"] for n in (a, b)]
    assert asked[0] == asked[1]
    assert len(asked[1]) == 1
    assert tokens == {'{model="m",node="b"}': 2.0}
    assert requests == {'{model="m",node="b"}': 1.0}


def bare(said: bytes) -> bytes:
    return OWN_TO_AN_ANSWER.sub(b"", said)


@PATHS
@STREAMS
async def test_a_node_that_nobody_can_connect_to_is_replaced(
    session: aiohttp.ClientSession, *, path: str, stream: bool
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        b.models["m"].in_flight = 50
        async with Gateway(gateway_config(a, b, timeouts=RARELY)) as gateway:
            await gateway.poller.first_round()
            await a.stop()
            status, _, headers = await ask(session, gateway, path, stream=stream)

    assert (status, headers["x-cortex-node"]) == (200, "b")


async def test_an_answer_that_breaks_in_the_middle_and_does_not_stream_is_made_anew(
    session: aiohttp.ClientSession,
) -> None:
    async with Torn(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        b.models["m"].in_flight = 50
        async with Gateway(gateway_config(a, b)) as gateway:
            status, said, headers = await ask(session, gateway)

    assert len(a.requests(CHAT)) == 1
    assert (status, headers["x-cortex-node"]) == (200, "b")
    assert orjson.loads(said)["choices"][0]["message"]["content"] == "Hello world"


async def test_a_stream_that_a_load_has_begun_goes_on_with_another_node(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = Catalogue({"cold": Profile("cold", pinned_on=("a",))})
    async with FakeNeuron([], "a") as a, FakeNeuron([], "b") as b:
        a.may_load.clear()
        refuses(a)
        async with Gateway(gateway_config(a, b), catalogue) as gateway:
            body = {"model": "cold", **BODIES[CHAT], "stream": True}
            async with session.post(gateway.url + CHAT, json=body) as response:
                await response.content.readuntil(b"\n\n")
                b.models["cold"] = FakeModel("cold", in_flight=50)
                await gateway.poller.refresh("b")
                a.may_load.set()
                text = (await response.read()).decode()

    events = [event for event in text.split("\n\n") if event.startswith("data:")]
    assert len(a.requests(CHAT)) == len(b.requests(CHAT)) == 1
    assert "".join(map(content, events)) == "Hello world"
    assert events.count("data: [DONE]") == 1
    assert '"error"' not in text


def content(event: str) -> str:
    if event == "data: [DONE]":
        return ""
    said: str = orjson.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
    return said


@pytest.mark.parametrize(("path", "status"), [(CHAT, 503), (MESSAGES, 529), (TEXT, 503)], ids=str)
@STREAMS
async def test_when_all_refuse_the_client_is_told_when_the_first_of_them_can(
    session: aiohttp.ClientSession, *, path: str, status: int, stream: bool
) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(["m"], "b") as b,
        FakeNeuron(["m"], "c") as c,
        Gateway(gateway_config(a, b, c)) as gateway,
    ):
        a.refuses = Overloaded("full", retry_after_seconds=9)
        b.refuses = Overloaded("full", retry_after_seconds=4)
        c.breaks = True

        refused = await ask(session, gateway, path, stream=stream)

    assert (refused[0], refused[2]["Retry-After"]) == (status, "4")
    assert refused[2]["x-cortex-node"] == "b"


@pytest.mark.parametrize(
    ("error", "status"), [(ContextLengthExceeded.of(9, 8), 400), (Overloaded("full"), 503)]
)
@STREAMS
async def test_an_error_names_the_node_that_was_asked(
    session: aiohttp.ClientSession, *, error: ApiError, status: int, stream: bool
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.refuses = error

        refused = await ask(session, gateway, stream=stream)

    assert refused[0] == status
    assert refused[2]["x-cortex-node"] == "a"
    assert refused[2]["x-cortex-reason"] == "only-replica"


async def test_an_error_before_a_node_was_asked_names_none(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron([]) as a, Gateway(gateway_config(a)) as gateway:
        status, _, headers = await ask(session, gateway)

    assert status == 404
    assert "x-cortex-node" not in headers


async def test_a_bug_names_the_node_too(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        monkeypatch.setattr(gateway.fleet, "worked", None)

        status, said, headers = await ask(session, gateway)

    assert (status, headers["x-cortex-node"]) == (500, "a")
    assert orjson.loads(said)["error"]["code"] == "internal_error"


@STREAMS
async def test_a_request_that_has_broken_two_nodes_is_given_to_no_third(
    session: aiohttp.ClientSession, *, stream: bool
) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(["m"], "b") as b,
        FakeNeuron(["m"], "c") as c,
        Gateway(gateway_config(a, b, c)) as gateway,
    ):
        for node in (a, b, c):
            node.breaks = True

        status, *_ = await ask(session, gateway, stream=stream)

    assert status == 502
    assert sum(len(node.requests(CHAT)) for node in (a, b, c)) == 2


async def test_a_silent_stream_goes_to_another_node(session: aiohttp.ClientSession) -> None:
    timeouts = msgspec.structs.replace(QUICK, between_bytes_seconds=0.2)
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        a.may_begin.clear()
        b.models["m"].in_flight = 50
        async with Gateway(gateway_config(a, b, timeouts=timeouts)) as gateway:
            status, _, headers = await ask(session, gateway, stream=True)

    assert (status, headers["x-cortex-node"]) == (200, "b")


@STREAMS
async def test_retries_and_the_wait_for_a_node_are_counted(
    session: aiohttp.ClientSession, *, stream: bool
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        refuses(a)
        b.models["m"].in_flight = 50
        async with Gateway(gateway_config(a, b)) as gateway:
            await ask(session, gateway, stream=stream)
            retries = await counted(session, gateway, "cortex_request_retries_total")
            waits = await counted(session, gateway, "cortex_queue_seconds_count")

    assert retries == {'{code="overloaded",model="m",node="a"}': 1.0}
    assert list(waits.values()) == [1.0]


async def states(session: aiohttp.ClientSession, gateway: Gateway) -> dict[str, float]:
    return await counted(session, gateway, "cortex_node_breaker_state")


@pytest.mark.parametrize(
    ("how", "stream"),
    [
        ("breaks", False),
        ("breaks", True),
        ("dies_after_tokens", True),
        ("fails_after_tokens", True),
    ],
)
async def test_a_node_that_polls_well_and_breaks_every_answer_is_closed(
    session: aiohttp.ClientSession, *, stream: bool, how: str
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        setattr(a, how, 1)
        for _ in range(3):
            await ask(session, gateway, stream=stream)
        asked = len(a.requests(CHAT))

        status, said, headers = await ask(session, gateway, stream=stream)

        assert (status, orjson.loads(said)["error"]["code"]) == (503, "recovering")
        assert 1 <= int(headers["Retry-After"]) <= 5
        assert len(a.requests(CHAT)) == asked == 3
        assert gateway.fleet.node("a").is_healthy
        assert await states(session, gateway) == {'{node="a"}': 2.0}


async def test_a_closed_node_is_tried_again_and_opened_by_an_answer(
    session: aiohttp.ClientSession,
) -> None:
    routing = Routing(breaker_failures=1, breaker_open_seconds=0.05)
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a, routing=routing)) as gateway:
        a.breaks = True
        await ask(session, gateway)
        a.breaks = False
        await until(lambda: gateway.fleet.snapshot().nodes[0].breaker == "half_open")
        before = await states(session, gateway)

        status, *_ = await ask(session, gateway)

        assert (status, before) == (200, {'{node="a"}': 1.0})
        assert await states(session, gateway) == {'{node="a"}': 0.0}


async def test_while_one_request_tries_a_node_others_are_told_to_come_back(
    session: aiohttp.ClientSession,
) -> None:
    routing = Routing(breaker_failures=1, breaker_open_seconds=0.5)
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a, routing=routing)) as gateway:
        a.breaks = True
        await ask(session, gateway)
        a.breaks = False
        a.may_begin.clear()
        a.answering.clear()
        await until(lambda: gateway.fleet.snapshot().nodes[0].breaker == "half_open")

        async with asyncio.TaskGroup() as group:
            trial = group.create_task(ask(session, gateway))
            await a.answering.wait()
            status, *_ = await ask(session, gateway)
            a.may_begin.set()

    assert (status, trial.result()[0]) == (503, 200)


async def test_once_a_trial_is_being_answered_others_may_follow(
    session: aiohttp.ClientSession,
) -> None:
    routing = Routing(breaker_failures=1, breaker_open_seconds=0.5)
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a, routing=routing)) as gateway:
        a.breaks = True
        await ask(session, gateway)
        a.breaks = False
        a.may_finish.clear()
        await until(lambda: gateway.fleet.snapshot().nodes[0].breaker == "half_open")

        body = {"model": "m", **BODIES[CHAT], "stream": True}
        async with session.post(gateway.url + CHAT, json=body) as trial:
            await trial.content.readuntil(b"\n\n")
            async with session.post(gateway.url + CHAT, json=body) as another:
                a.may_finish.set()
                text = await another.text()

    assert (another.status, text.endswith("data: [DONE]\n\n")) == (200, True)


async def test_refusals_in_words_close_nothing(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        for error in (
            Overloaded("full"),
            RateLimitExceeded("later"),
            ContextLengthExceeded.of(9, 8),
        ):
            a.refuses = error
            for _ in range(3):
                await ask(session, gateway)
        a.refuses = None

        status, *_ = await ask(session, gateway)

    assert status == 200


async def test_a_closed_node_leaves_its_requests_to_the_other(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b:
        a.breaks = True
        b.models["m"].in_flight = 50
        async with Gateway(gateway_config(a, b)) as gateway:
            answers = [await ask(session, gateway, headers={}) for _ in range(5)]

    assert [status for status, *_ in answers] == [200] * 5
    assert (len(a.requests(CHAT)), len(b.requests(CHAT))) == (3, 5)


async def test_a_session_stays_where_its_prompts_are_cached(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(["m"], "b") as b,
        Gateway(gateway_config(a, b)) as gateway,
    ):
        said = [await ask(session, gateway, headers={"session-id": str(n % 8)}) for n in range(24)]
        outcomes = await counted(session, gateway, "cortex_affinity_total")

    homes = [headers["x-cortex-node"] for *_, headers in said]
    assert homes[:8] == homes[8:16] == homes[16:]
    assert set(homes) == {"a", "b"}
    assert {headers["x-cortex-reason"] for *_, headers in said} == {"session-home"}
    assert outcomes == {'{model="m",outcome="home"}': 24.0}


async def test_a_session_moves_when_its_home_is_busy(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(["m"], "b") as b,
        Gateway(gateway_config(a, b)) as gateway,
    ):
        _, _, before = await ask(session, gateway)
        home, other = (a, b) if before["x-cortex-node"] == "a" else (b, a)
        home.models["m"].in_flight = 50
        await gateway.poller.refresh(home.name)

        _, _, after = await ask(session, gateway)
        outcomes = await counted(session, gateway, "cortex_affinity_total")

    assert (after["x-cortex-node"], after["x-cortex-reason"]) == (other.name, "session-moved")
    assert outcomes['{model="m",outcome="moved"}'] == 1.0


async def test_keep_alive_is_noted_for_the_model_that_answered(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        status, *_ = await ask(session, gateway, keep_alive="5m")

        assert status == 200
        assert gateway.fleet.snapshot().stay_seconds == {("a", "m"): 300.0}
        assert "keep_alive" not in a.requests(CHAT)[0].body


COLD = Catalogue({"m": Profile("m")})


@PATHS
@STREAMS
async def test_a_model_that_is_only_on_a_node_nobody_can_reach_is_placed_elsewhere(
    session: aiohttp.ClientSession, *, path: str, stream: bool
) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron([], "b") as b,
        Gateway(gateway_config(a, b, timeouts=RARELY), COLD) as gateway,
    ):
        await gateway.poller.first_round()
        await a.stop()
        status, _, headers = await ask(session, gateway, path, stream=stream)

    assert (status, headers["x-cortex-node"]) == (200, "b")
    assert headers["x-cortex-reason"] == "loaded-on-demand"


@STREAMS
@pytest.mark.parametrize("catalogue", [COLD, Catalogue()], ids=["known", "stranger"])
async def test_where_the_only_node_cannot_be_reached_the_client_is_told_to_come_back(
    session: aiohttp.ClientSession, *, stream: bool, catalogue: Catalogue
) -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        Gateway(gateway_config(a, timeouts=RARELY), catalogue) as gateway,
    ):
        await gateway.poller.first_round()
        await a.stop()
        status, said, headers = await ask(session, gateway, stream=stream)

    assert (status, orjson.loads(said)["error"]["code"]) == (503, "recovering")
    assert int(headers["Retry-After"]) > 0


async def test_a_full_replica_beside_one_that_cannot_be_reached_is_no_reason_for_a_third(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(["m"], "b") as b, FakeNeuron([], "c") as c:
        refuses(b)
        async with Gateway(gateway_config(a, b, c, timeouts=RARELY), COLD) as gateway:
            await gateway.poller.first_round()
            await a.stop()
            status, _, headers = await ask(session, gateway)

    assert (status, headers["Retry-After"]) == (503, "2")
    assert c.requests("/models/load") == []
