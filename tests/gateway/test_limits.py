"""Budgets and limits of keys, as a client meets them: nothing that is refused reaches a node."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.config import Budget, Entitlements, GatewayConfig, Key
from cortex.gateway.state import FILE
from cortex.ipc.errors import ModelNotFound, Overloaded
from cortex.ipc.node_api import EMBEDDED_MODEL
from every_dialect import CHAT, EVERY_DIALECT, SHORT
from fakes import FakeNeuron, gateway_config, until

STREAM = {**SHORT, "stream": True}
HEADERS = {"x-api-key": "sk-of-somebody"}


def limited(
    neuron: FakeNeuron, budget: Budget | None = None, max_in_flight: int | None = None
) -> GatewayConfig:
    key = Key("sk-of-somebody", "somebody", budget=budget, max_in_flight=max_in_flight)
    return gateway_config(neuron, entitlements=Entitlements(keys=(key,)))


async def ask(
    session: aiohttp.ClientSession,
    gateway: Gateway,
    body: dict[str, Any] = SHORT,
    path: str = CHAT,
    headers: dict[str, str] = HEADERS,
) -> aiohttp.ClientResponse:
    async with session.post(gateway.url + path, json=body, headers=headers) as response:
        await response.read()
        return response


def told(gateway: Gateway, budget: Budget) -> tuple[int, int]:
    """Return the tokens that are spent and reserved."""
    numbers = gateway.budgets.told("somebody", budget)
    return numbers["spent_tokens"], numbers["reserved_tokens"]


@pytest.mark.parametrize(("path", "body"), EVERY_DIALECT)
async def test_a_spent_balance_is_429_in_every_dialect_and_reaches_no_node(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    async with Gateway(limited(neuron, Budget(1))) as gateway:
        response = await ask(session, gateway, body, path)
        error = (await response.json())["error"]

    assert response.status == 429
    assert "Retry-After" not in response.headers
    assert error["type"] == ("billing_error" if "messages" in path else "insufficient_quota")
    assert error.get("code", "insufficient_quota") == "insufficient_quota"
    assert "'somebody'" in error["message"]
    assert neuron.received == []


@pytest.mark.parametrize(("path", "body"), EVERY_DIALECT)
async def test_a_spent_window_is_429_and_says_when_to_come_back(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    async with Gateway(limited(neuron, Budget(1, per_seconds=60))) as gateway:
        response = await ask(session, gateway, body, path)
        error = (await response.json())["error"]

    assert response.status == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert error.get("code", "rate_limit_exceeded") == "rate_limit_exceeded"
    assert neuron.received == []


@pytest.mark.parametrize(("path", "body"), EVERY_DIALECT)
async def test_within_its_budget_a_request_is_served_and_pays_what_it_cost(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    budget = Budget(10_000)

    async with Gateway(limited(neuron, budget)) as gateway:
        response = await ask(session, gateway, body, path)

        assert (response.status, len(neuron.requests("/tokenize")) <= 1) == (200, True)
        assert told(gateway, budget) == (7 if "embeddings" in path else 9, 0)


async def test_a_cold_model_is_not_loaded_for_somebody_without_budget(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as cold, Gateway(limited(cold, Budget(1))) as gateway:
        response = await ask(session, gateway, {**SHORT, "model": EMBEDDED_MODEL})

    assert (response.status, cold.received) == (429, [])


async def test_parallel_requests_never_exceed_a_budget(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    budget = Budget(200)

    async with Gateway(limited(neuron, budget)) as gateway:
        answers = await asyncio.gather(*(ask(session, gateway) for _ in range(30)))
        statuses = [answer.status for answer in answers]

        assert {200, 429} == set(statuses)
        assert told(gateway, budget) == (9 * statuses.count(200), 0)
        assert len(neuron.requests(CHAT)) == statuses.count(200)
        assert told(gateway, budget)[0] <= 200


async def test_one_request_more_than_allowed_at_the_same_time_is_429(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(limited(neuron, max_in_flight=1)) as gateway:
        async with session.post(gateway.url + CHAT, json=STREAM, headers=HEADERS) as running:
            await running.content.readany()
            refused = await ask(session, gateway)
            neuron.may_finish.set()
            await running.read()
        await until(lambda: not gateway.budgets.in_flight("somebody"))
        served = await ask(session, gateway)

    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    assert (await refused.json())["error"]["code"] == "rate_limit_exceeded"
    assert (served.status, len(neuron.requests(CHAT))) == (200, 2)


async def test_what_fails_at_the_node_costs_nothing(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    budget = Budget(1000)

    async with Gateway(limited(neuron, budget)) as gateway:
        neuron.refuses = Overloaded("full")
        await ask(session, gateway)
        neuron.refuses, neuron.fails_after_tokens = None, 1
        await ask(session, gateway, STREAM)

        assert told(gateway, budget) == (0, 0)
        assert gateway.budgets.in_flight("somebody") == 0


async def test_a_client_that_leaves_in_the_middle_pays_for_what_it_got(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    budget = Budget(1000)
    neuron.may_finish.clear()

    async with Gateway(limited(neuron, budget)) as gateway:
        response = await session.post(gateway.url + CHAT, json=STREAM, headers=HEADERS)
        seen = b""
        while b" world" not in seen:
            seen += await response.content.readany()
        response.close()
        await until(lambda: not gateway.budgets.in_flight("somebody"))

        prompt = -(-len(msgspec.json.encode(neuron.received[0].body)) // 4)
        spent, reserved = told(gateway, budget)
        assert (spent - prompt in (2, 3, 4, 5, 6), reserved) == (True, 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_before_the_first_token_pays_for_its_prompt_in_every_book(
    *,
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    logged: list[dict[str, Any]],
    stream: bool,
) -> None:
    budget = Budget(1000)
    neuron.may_begin.clear()

    async with Gateway(limited(neuron, budget)) as gateway:
        asking = asyncio.ensure_future(ask(session, gateway, {**STREAM, "stream": stream}))
        await neuron.answering.wait()
        asking.cancel()
        await until(lambda: not gateway.budgets.in_flight("somebody"))

        prompt = -(-len(json.dumps(neuron.received[0].body)) // 4)
        assert told(gateway, budget) == (prompt, 0)
        (row,) = await gateway.ledger.rows(key="somebody")
        assert (row.prompt_tokens, row.completion_tokens) == (prompt, 0)
        async with session.get(f"{gateway.metrics_url}/metrics") as scraped:
            assert f'spend_tokens_total{{key="somebody"}} {prompt}.0' in await scraped.text()
        (line,) = [it for it in logged if it["event"] == "request finished"]
        assert (line["prompt_tokens"], line["completion_tokens"]) == (prompt, 0)


async def test_a_client_that_leaves_while_the_model_is_looked_for_again_pays_nothing(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    budget = Budget(1000)
    neuron.refuses = ModelNotFound("not here", param="model")

    async with Gateway(limited(neuron, budget)) as gateway:
        await gateway.poller.first_round()
        neuron.may_poll.clear()
        asking = asyncio.ensure_future(ask(session, gateway))
        await until(lambda: gateway.fleet.own("a") == {} and bool(neuron.requests(CHAT)))
        asking.cancel()
        await until(lambda: not gateway.budgets.in_flight("somebody"))

        assert told(gateway, budget) == (0, 0)


async def test_a_restart_forgives_nothing(
    neuron: FakeNeuron, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    config = limited(neuron, Budget(35))
    statuses = []

    for _ in range(2):
        async with Gateway(config, state=tmp_path / FILE) as gateway:
            statuses.append((await ask(session, gateway)).status)

    assert statuses == [200, 429]


async def test_a_budget_that_is_reloaded_counts_from_the_next_request_on(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(limited(neuron, Budget(1))) as gateway:
        before = await ask(session, gateway)
        gateway.written.config = limited(neuron, Budget(1000))
        after = await ask(session, gateway)

    assert (before.status, after.status) == (429, 200)


async def test_what_a_response_goes_on_from_is_paid_for_again(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    first = {"model": "qwen3-8b", "input": "long " * 600, "max_output_tokens": 9}

    async with Gateway(limited(neuron, Budget(1000))) as gateway:
        told_first = await (await ask(session, gateway, first, "/v1/responses")).json()
        gateway.written.config = limited(neuron, Budget(500))
        alone = {"model": "qwen3-8b", "input": "x", "max_output_tokens": 9}
        following = {**alone, "previous_response_id": told_first["id"]}
        statuses = [
            (await ask(session, gateway, body, "/v1/responses")).status
            for body in (following, alone)
        ]

    assert statuses == [429, 200]


async def test_those_without_a_key_are_not_limited_by_others(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(limited(neuron, Budget(1), max_in_flight=1)) as gateway:
        response = await ask(session, gateway, headers={})

    assert response.status == 200
