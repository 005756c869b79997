"""Keys: who comes in, and what they may use."""

from typing import Any

import aiohttp
import msgspec
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Entitlements, GatewayConfig, Key, Listening
from fakes import FakeNeuron, gateway_config

CHAT = "/v1/chat/completions"
BODY = {"model": "qwen3-8b", "messages": []}
KEYS = (
    Key("sk-everything", "boss"),
    Key("sk-only-small", "guest", ["small"], operator=True),
    Key("sk-only-qwen", "friend", ["nick"]),
)
CATALOGUE = Catalogue({}, {"nick": "qwen3-8b"})


def guarded(neuron: FakeNeuron, *, required: bool) -> GatewayConfig:
    return gateway_config(neuron, entitlements=Entitlements(require_auth=required, keys=KEYS))


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, path: str = CHAT, **headers: str
) -> tuple[int, Any]:
    async with session.post(gateway.url + path, json=BODY, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-everything"},
        {"Authorization": "bearer  sk-everything"},
        {"x-api-key": "sk-everything"},
        {"Authorization": "Basic abc", "x-api-key": "sk-everything"},
        {"Authorization": "Bearer placeholder", "x-api-key": "sk-everything"},
        {"Authorization": "Bearer sk-everything", "x-api-key": "placeholder"},
    ],
    ids=str,
)
async def test_a_key_lets_in(
    neuron: FakeNeuron, session: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    async with Gateway(guarded(neuron, required=True)) as gateway:
        status, _ = await ask(session, gateway, **headers)

    assert (status, neuron.received[0].headers["x-cortex-key"]) == (200, "boss")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"Authorization": "Bearer é"}],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/fleet/models/load"])
async def test_without_a_right_key_it_is_401_where_keys_are_required(
    neuron: FakeNeuron, session: aiohttp.ClientSession, headers: dict[str, str], path: str
) -> None:
    async with Gateway(guarded(neuron, required=True)) as gateway:
        status, body = await ask(session, gateway, path, **headers)

    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert neuron.received == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer placeholder"}], ids=str)
async def test_placeholders_are_ignored_where_keys_are_optional(
    neuron: FakeNeuron, session: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    async with Gateway(guarded(neuron, required=False)) as gateway:
        status, _ = await ask(session, gateway, **headers)

    assert (status, "x-cortex-key" in neuron.received[0].headers) == (200, False)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_key_may_be_kept_from_a_model(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str
) -> None:
    async with Gateway(guarded(neuron, required=False)) as gateway:
        status, body = await ask(session, gateway, path, **{"x-api-key": "sk-only-small"})

    assert (status, body["error"]["code"]) == (403, "model_not_allowed")
    assert neuron.received == []


async def test_a_key_may_name_its_models_by_alias(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(guarded(neuron, required=True), CATALOGUE) as gateway:
        status, _ = await ask(session, gateway, **{"x-api-key": "sk-only-qwen"})

    assert status == 200


async def test_a_key_sees_only_its_models(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    headers = {"x-api-key": "sk-only-small"}
    async with Gateway(guarded(neuron, required=True)) as gateway:
        await gateway.poller.first_round()
        async with session.get(gateway.url + "/v1/models", headers=headers) as response:
            listed = (await response.json())["data"]
        url = gateway.url + "/v1/models/qwen3-8b"
        async with session.get(url, headers=headers) as response:
            status = response.status

    assert (listed, status) == ([], 403)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("HEAD", "/"),
        ("GET", "/"),
        ("HEAD", "/api/hello"),
        ("HEAD", "/openapi.json"),
    ],
)
async def test_health_is_public(
    neuron: FakeNeuron, session: aiohttp.ClientSession, method: str, path: str
) -> None:
    async with (
        Gateway(guarded(neuron, required=True)) as gateway,
        session.request(method, gateway.url + path) as response,
    ):
        assert response.status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/fleet", "/version"])
async def test_nothing_else_is_public(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str
) -> None:
    async with (
        Gateway(guarded(neuron, required=True)) as gateway,
        session.get(gateway.url + path) as response,
    ):
        assert response.status == 401


async def test_counting_tokens_of_a_forbidden_model_is_403(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(guarded(neuron, required=True)) as gateway:
        body = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "x"}]}
        headers = {"x-api-key": "sk-only-small"}
        url = gateway.url + "/v1/messages/count_tokens"
        async with session.post(url, json=body, headers=headers) as response:
            said = await response.json()

    assert (response.status, said["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize("what", ["load", "unload"])
async def test_a_forbidden_model_is_neither_loaded_nor_unloaded(
    neuron: FakeNeuron, session: aiohttp.ClientSession, what: str
) -> None:
    async with (
        Gateway(guarded(neuron, required=True)) as gateway,
        session.post(
            f"{gateway.url}/fleet/models/{what}",
            json={"model": "qwen3-8b"},
            headers={"x-api-key": "sk-only-small"},
        ) as response,
    ):
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (403, "model_not_allowed")
    assert "qwen3-8b" in neuron.models


async def test_a_node_hears_the_priority_of_the_key_and_nothing_that_a_client_made_up(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    keys = (Key("sk-in-a-hurry", "chief", priority=7), Key("sk-everything", "boss"))
    config = gateway_config(neuron, entitlements=Entitlements(keys=keys))
    forged = {"x-cortex-priority": "10", "x-cortex-key": "root", "x-cortex-made-up": "1"}

    async with Gateway(config) as gateway:
        for key in ("sk-in-a-hurry", "sk-everything", "placeholder"):
            await ask(session, gateway, **forged, **{"x-api-key": key})

    said = [
        {name: value for name, value in received.headers.items() if name.startswith("x-cortex")}
        for received in neuron.received
    ]
    assert said == [
        {"x-cortex-usage": "1", "x-cortex-key": "chief", "x-cortex-priority": "7"},
        {"x-cortex-usage": "1", "x-cortex-key": "boss"},
        {"x-cortex-usage": "1"},
    ]


async def test_keys_that_are_reloaded_count_from_the_next_request_on(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    headers = {"x-api-key": "sk-everything"}

    async with Gateway(guarded(neuron, required=True)) as gateway:
        before, _ = await ask(session, gateway, **headers)
        others = Entitlements(require_auth=True, keys=(Key("sk-of-another", "other"),))
        gateway.written.config = gateway_config(neuron, entitlements=others)
        after, _ = await ask(session, gateway, **headers)
        new, _ = await ask(session, gateway, **{"x-api-key": "sk-of-another"})

    assert (before, after, new) == (200, 401, 200)


DRAIN = "/fleet/nodes/a/drain"
EVIL = "http://evil.example"


async def answer_of(
    gateway: Gateway, session: aiohttp.ClientSession, method: str, path: str, **headers: str
) -> tuple[int, str]:
    """Return status and code of the answer to what a page may send without asking first."""
    sent = {"Content-Type": "text/plain", **headers}
    async with session.request(method, gateway.url + path, headers=sent) as response:
        body = await response.read()
        return response.status, msgspec.json.decode(body)["error"][
            "code"
        ] if not response.ok else ""


@pytest.mark.parametrize(
    ("asked", "headers", "answer"),
    [
        (("POST", DRAIN), {}, (200, "")),
        (("POST", DRAIN), {"Origin": "http://localhost:3000"}, (200, "")),
        (("POST", DRAIN), {"Origin": EVIL}, (403, "foreign_origin")),
        (("POST", DRAIN), {"Origin": "null"}, (403, "foreign_origin")),
        (("POST", DRAIN), {"Host": "evil.example", "Origin": EVIL}, (403, "foreign_origin")),
        (("GET", "/fleet"), {"Host": "evil.example"}, (403, "foreign_origin")),
        (("GET", "/fleet"), {"Host": "cortex.lan"}, (200, "")),
        (("GET", "/health"), {"Host": "localhost:1", "Origin": EVIL}, (200, "")),
    ],
    ids=str,
)
async def test_without_keys_pages_of_elsewhere_are_kept_out(
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    asked: tuple[str, str],
    headers: dict[str, str],
    answer: tuple[int, str],
) -> None:
    listening = Listening("127.0.0.1:0", "127.0.0.1:0", ("cortex.lan",))
    config = msgspec.structs.replace(gateway_config(neuron), gateway=listening)
    async with Gateway(config) as gateway:
        was = await answer_of(gateway, session, *asked, **headers)
        is_drained = "a" in gateway.fleet.drained

    assert (was, is_drained) == (answer, (*asked, answer[0]) == ("POST", DRAIN, 200))


async def test_a_refused_page_is_told_in_the_dialect_what_the_operator_can_do(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, body = await ask(session, gateway, "/v1/messages", Origin=EVIL)

    assert (status, body["type"], body["error"]["type"]) == (403, "error", "permission_error")
    assert "require_auth" in body["error"]["message"]
    assert neuron.received == []


async def test_where_keys_are_required_a_page_with_one_comes_in(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    headers = {"Origin": EVIL, "Host": "cortex.lan", "x-api-key": "sk-everything"}
    async with Gateway(guarded(neuron, required=True)) as gateway:
        status, _ = await ask(session, gateway, **headers)

    assert status == 200
