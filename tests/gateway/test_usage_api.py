"""``GET /fleet/usage``: who has used what."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Entitlements, GatewayConfig, Key
from cortex.gateway.ledger import today
from cortex.gateway.state import FILE
from cortex.ipc.errors import Overloaded
from every_dialect import CHAT, EVERY_DIALECT, SHORT
from fakes import FakeNeuron, gateway_config, until

STREAM = {**SHORT, "stream": True}
KEYS = (
    Key("sk-the-operator", "boss", operator=True),
    Key("sk-of-a-guest", "guest"),
)
BOSS, GUEST = {"x-api-key": "sk-the-operator"}, {"x-api-key": "sk-of-a-guest"}


def keyed(neuron: FakeNeuron, *, required: bool = False) -> GatewayConfig:
    return gateway_config(neuron, entitlements=Entitlements(require_auth=required, keys=KEYS))


async def ask(
    session: aiohttp.ClientSession,
    gateway: Gateway,
    headers: dict[str, str],
    body: dict[str, Any] = SHORT,
    path: str = CHAT,
) -> None:
    async with session.post(gateway.url + path, json=body, headers=headers) as response:
        await response.read()


async def usage(
    session: aiohttp.ClientSession,
    gateway: Gateway,
    query: str = "",
    headers: dict[str, str] = BOSS,
) -> tuple[int, Any]:
    url = f"{gateway.url}/fleet/usage?{query}"
    async with session.get(url, headers=headers) as response:
        said = await response.json()
        return response.status, said.get("usage", said)


def keys(rows: list[dict[str, Any]]) -> list[str]:
    return [row["key"] for row in rows]


@pytest.mark.parametrize(("path", "body"), EVERY_DIALECT)
async def test_a_request_of_every_dialect_is_counted_once_with_its_tokens(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    neuron.cached_tokens = 3

    async with Gateway(keyed(neuron)) as gateway:
        await ask(session, gateway, GUEST, body, path)
        status, rows = await usage(session, gateway)

    embeds = path == "/v1/embeddings"
    assert status == 200
    assert rows == [
        {
            "key": "guest",
            "model": "qwen3-8b",
            "day": today(),
            "requests": 1,
            "prompt_tokens": 7,
            "cached_prompt_tokens": 0 if embeds else 3,
            "completion_tokens": 0 if embeds else 2,
        }
    ]


async def test_an_alias_is_counted_and_found_as_its_model(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    catalogue = Catalogue({}, {"nick": "qwen3-8b"})

    async with Gateway(keyed(neuron), catalogue) as gateway:
        await ask(session, gateway, GUEST, {**SHORT, "model": "nick"})
        _, rows = await usage(session, gateway, "model=nick")

    assert [row["model"] for row in rows] == ["qwen3-8b"]


async def test_what_was_refused_is_not_counted(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(keyed(neuron)) as gateway:
        await ask(session, gateway, GUEST, {**SHORT, "model": "made-up"})
        neuron.refuses = Overloaded("full")
        await ask(session, gateway, GUEST)
        _, rows = await usage(session, gateway)

    assert rows == []


async def test_a_client_that_left_is_counted_with_what_it_got(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(keyed(neuron)) as gateway:
        response = await session.post(gateway.url + CHAT, json=STREAM, headers=GUEST)
        seen = b""
        while b" world" not in seen:
            seen += await response.content.readany()
        response.close()
        await until(lambda: not gateway.budgets.in_flight("guest"))
        _, (row,) = await usage(session, gateway)

    assert (row["key"], row["requests"]) == ("guest", 1)
    assert row["prompt_tokens"] > 0
    assert 2 <= row["completion_tokens"] <= 4


async def test_usage_can_be_asked_for_by_key_model_and_day(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(keyed(neuron)) as gateway:
        for headers in (BOSS, GUEST, {}):
            await ask(session, gateway, headers)

        async def found(query: str) -> list[str]:
            return keys((await usage(session, gateway, query))[1])

        assert await found("") == ["-", "boss", "guest"]
        assert await found("key=guest") == ["guest"]
        assert await found("key=-") == ["-"]
        assert await found("model=another") == []
        assert await found(f"since={today()}&model=qwen3-8b") == ["-", "boss", "guest"]
        assert await found("since=2999-01-01") == []


@pytest.mark.parametrize("since", ["yesterday", "2026-13-01", ""])
async def test_a_day_that_is_none_is_400(
    neuron: FakeNeuron, session: aiohttp.ClientSession, since: str
) -> None:
    async with Gateway(keyed(neuron)) as gateway:
        status, said = await usage(session, gateway, f"since={since}")

    assert (status, said["error"]["code"], said["error"]["param"]) == (
        400,
        "invalid_request",
        "since",
    )


async def test_where_keys_are_required_a_key_sees_its_own_and_an_operator_everybodys(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(keyed(neuron, required=True)) as gateway:
        for headers in (BOSS, GUEST):
            await ask(session, gateway, headers)

        assert keys((await usage(session, gateway))[1]) == ["boss", "guest"]
        assert keys((await usage(session, gateway, "", GUEST))[1]) == ["guest"]
        assert keys((await usage(session, gateway, "key=guest", GUEST))[1]) == ["guest"]
        status, said = await usage(session, gateway, "key=boss", GUEST)
        assert (status, said["error"]["code"]) == (403, "operator_only")


async def test_where_keys_are_optional_everybody_sees_everything(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(keyed(neuron)) as gateway:
        await ask(session, gateway, BOSS)
        _, rows = await usage(session, gateway, "", {})

    assert keys(rows) == ["boss"]


async def test_usage_is_there_after_a_restart(
    neuron: FakeNeuron, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    seen = []

    for _ in range(2):
        async with Gateway(keyed(neuron), state=tmp_path / FILE) as gateway:
            await ask(session, gateway, GUEST)
            _, rows = await usage(session, gateway)
            seen += [row["requests"] for row in rows]

    assert seen == [1, 2]
