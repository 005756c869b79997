"""Who may use a node, and whose word about a client counts."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict
from structlog.testing import capture_logs

from certificates import Authority
from cortex.ipc.errors import InvalidRequest
from cortex.ipc.settings import ConfigError
from cortex.runtime.access import Access, priority_of
from cortex.runtime.config import AuthConfig, NeuronConfig, TlsConfig
from cortex.runtime.route_table import NEURON
from fake_node import FakeNode, FakeText, posting, says, serving
from fakes import until

MODEL = "m"
KEYS = "first-key\nsecond-key\n"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
PATHS = [(route.method, route.shown_path.format(id=MODEL, index=0)) for route in NEURON.routes]


def guarded(folder: Path, text: str = KEYS) -> NeuronConfig:
    """Return the configuration of a node with the keys in *text*."""
    path = folder / "keys"
    path.touch(mode=0o600)
    path.write_text(text)
    return NeuronConfig(auth=AuthConfig(str(path)))


async def status_of(config: NeuronConfig, method: str, path: str, **headers: str) -> int:
    """Return the status of a request without a body."""
    async with (
        serving(FakeNode(MODEL), config=config) as client,
        client.request(method, path, headers=headers) as response,
    ):
        return response.status


@pytest.mark.parametrize(("method", "path"), [*PATHS, ("GET", "/none"), ("PUT", "/health")])
async def test_with_keys_nothing_is_answered_without_one(
    tmp_path: Path, method: str, path: str
) -> None:
    assert await status_of(guarded(tmp_path), method, path) == 401


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_key_opens_every_route(tmp_path: Path, method: str, path: str) -> None:
    assert await status_of(guarded(tmp_path), method, path, Authorization="Bearer first-key") != 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer second-key"}, 200),
        ({"x-api-key": "first-key"}, 200),
        ({"x-api-key": "placeholder", "Authorization": "Bearer first-key"}, 200),
        ({"Authorization": "Bearer first-key\u00e9"}, 401),
        ({"Authorization": "Basic first-key"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "first-ke"}, 401),
    ],
    ids=str,
)
async def test_a_key_comes_as_bearer_or_api_key(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    assert await status_of(guarded(tmp_path), "GET", "/health", **headers) == status


async def test_a_refusal_says_how_a_key_comes_and_echoes_the_request_s_id(tmp_path: Path) -> None:
    async with (
        serving(FakeNode(MODEL), config=guarded(tmp_path)) as client,
        client.get("/models", headers={"x-request-id": "mine"}) as response,
    ):
        body = await response.json()

        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["x-request-id"] == "mine"
        assert body["error"]["code"] == "invalid_api_key"
        assert body["error"]["type"] == "authentication_error"


async def test_a_refused_request_is_not_begun(tmp_path: Path) -> None:
    node = FakeNode(MODEL)
    async with (
        serving(node, config=guarded(tmp_path)) as client,
        client.post("/models/unload", json={"model_id": MODEL}) as response,
    ):
        assert response.status == 401

    assert node.acts == []


async def test_without_keys_whoever_reaches_the_node_may_use_it() -> None:
    assert await status_of(NeuronConfig(), "GET", "/health") == 200


EVIL = "http://evil.example"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/models/unload", {"Origin": EVIL}, 403),
        ("POST", "/models/unload", {"Origin": "null"}, 403),
        ("POST", "/devices/0/restart", {"Origin": EVIL}, 403),
        ("POST", "/devices/0/restart", {"Origin": "null"}, 403),
        ("POST", "/devices/0/restart", {"Origin": "http://localhost:3000"}, 200),
        ("POST", "/devices/0/restart", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Host": "gpu7.lan:13131"}, 200),
        ("GET", "/health", {"Host": "localhost", "Origin": EVIL}, 200),
    ],
    ids=str,
)
async def test_without_keys_pages_of_elsewhere_are_kept_out(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    config = NeuronConfig(allowed_hosts=("gpu7.lan",))

    assert await status_of(config, method, path, **headers) == status


async def test_a_page_that_is_kept_out_has_done_nothing_and_is_told_why() -> None:
    node = FakeNode(MODEL)
    async with posting(
        node, "/models/unload", {"model_id": MODEL}, headers={"Origin": EVIL}
    ) as response:
        body = await response.json()

    assert (body["error"]["code"], body["error"]["type"]) == ("foreign_origin", "permission_error")
    assert "key_file" in body["error"]["message"]
    assert node.acts == []


async def test_a_host_of_any_bytes_is_put_into_words() -> None:
    assert await status_of(NeuronConfig(), "GET", "/health", Host="h\u00f6st") == 403


async def test_a_node_that_listens_elsewhere_has_any_name() -> None:
    config = NeuronConfig(listen="10.0.0.7:13131")

    assert await status_of(config, "GET", "/health", Host="gpu7.lan:13131") == 200


async def test_a_page_with_a_key_comes_in(tmp_path: Path) -> None:
    headers = {"Origin": EVIL, "Host": "gpu7.lan", "x-api-key": "first-key"}

    assert await status_of(guarded(tmp_path), "POST", "/devices/0/restart", **headers) == 200


async def logged_of(config: NeuronConfig, **headers: str) -> dict[str, Any]:
    """Return the canonical line of a request with *headers*."""
    node = FakeNode(MODEL)
    node.script = says("Paris.")
    with capture_logs() as lines:
        async with (
            serving(node, config=config) as client,
            client.post("/v1/chat/completions", json=CHAT, headers=headers) as response,
        ):
            assert response.status == 200
    return next(dict(line) for line in lines if line["event"] == "request finished")


async def test_the_log_says_whose_request_it_was(tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer first-key", "x-cortex-key": "laptop"}

    assert (await logged_of(guarded(tmp_path), **headers))["key"] == "laptop"


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "-", "é"])
async def test_a_name_that_is_no_key_s_id_is_not_taken(name: str) -> None:
    assert "key" not in await logged_of(NeuronConfig(), **{"x-cortex-key": name})


@pytest.mark.parametrize("said", ["-10", "0", "3", "10"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_a_priority_is_honoured(path: str, said: str) -> None:
    node = FakeNode(MODEL)
    node.models[MODEL].text = FakeText(pooling="last")
    body = CHAT if "chat" in path else {"model": MODEL, "input": "Hello"}

    async with posting(node, path, body, headers={"x-cortex-priority": said}) as response:
        assert response.status == 200

    assert node.priorities == ([int(said)] if "chat" in path else [])


@pytest.mark.parametrize("said", ["", "11", "-11", "1.0", "high", "1" * 5000, "٣", " 1 2"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_a_priority_that_is_none_is_refused_in_words(path: str, said: str) -> None:
    node = FakeNode(MODEL)
    node.models[MODEL].text = FakeText(pooling="last")
    body = CHAT if "chat" in path else {"model": MODEL, "input": "Hello"}

    async with posting(node, path, body, headers={"x-cortex-priority": said}) as response:
        error = (await response.json())["error"]

    assert (response.status, error["code"], error["param"]) == (
        400,
        "invalid_request",
        "x-cortex-priority",
    )
    assert "-10 to 10" in error["message"]


async def test_two_priorities_are_none() -> None:
    headers = CIMultiDict([("x-cortex-priority", "1"), ("x-cortex-priority", "2")])

    with pytest.raises(InvalidRequest):
        priority_of(headers)


async def test_without_a_key_nobody_is_urgent(tmp_path: Path) -> None:
    node = FakeNode(MODEL)
    headers = {"x-cortex-priority": "9"}

    async with posting(
        node, "/v1/chat/completions", CHAT, headers, config=guarded(tmp_path)
    ) as response:
        assert response.status == 401

    assert node.priorities == []


def test_a_key_file_that_cannot_be_used_names_the_option(tmp_path: Path) -> None:
    config = guarded(tmp_path, "short")

    with pytest.raises(ConfigError, match=r"^auth\.key_file: .*/keys: key 1 has less than 8"):
        Access.of(config)


def test_a_certificate_that_cannot_be_used_names_the_option(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path).certify()
    key.chmod(0o644)

    with pytest.raises(ConfigError, match=r"^tls: .*/node\.key holds a secret"):
        Access.of(NeuronConfig(tls=TlsConfig(str(certificate), str(key))))


def test_without_certificate_connections_are_plain(tmp_path: Path) -> None:
    assert Access.of(guarded(tmp_path)).ssl_context is None


def knows(access: Access, key: str) -> bool:
    """Return whether *access* admits who has *key*."""
    return access.admits(CIMultiDict({"x-api-key": key}))


def test_a_reload_takes_new_keys_and_forgets_old_ones(tmp_path: Path) -> None:
    access = Access.of(guarded(tmp_path))

    guarded(tmp_path, "second-key\nthird-key")
    access.reload()

    assert [knows(access, f"{which}-key") for which in ("first", "second", "third")] == [
        False,
        True,
        True,
    ]


def test_a_broken_file_keeps_the_old_keys_and_is_said_to_be(tmp_path: Path) -> None:
    access = Access.of(guarded(tmp_path))

    guarded(tmp_path, "")
    with capture_logs() as lines:
        access.reload()

    assert knows(access, "first-key")
    assert (lines[0]["log_level"], lines[0]["option"]) == ("warning", "auth.key_file")
    assert "holds no key" in lines[0]["why"]


async def test_a_hangup_reloads_each_time(tmp_path: Path) -> None:
    access = Access.of(guarded(tmp_path))
    hangup = asyncio.Event()
    reloading = asyncio.ensure_future(access.reload_at(hangup))

    for key in ("third-key", "fourth-key"):
        guarded(tmp_path, key)
        hangup.set()
        await until(lambda key=key: knows(access, key))  # type: ignore[misc]  # bound at once

    reloading.cancel()
