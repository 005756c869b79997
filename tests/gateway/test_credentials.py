"""What the gateway shows to its nodes, and what they have to show."""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from certificates import Authority
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import BUILT_IN
from cortex.gateway.config import Engine, GatewayConfig, Neuron
from cortex.gateway.credentials import Credentials
from cortex.gateway.written import Written
from cortex.ipc.settings import ConfigError
from fakes import FakeNeuron, gateway_config, until

MODEL = "qwen3-8b"
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": []}


def key_file(folder: Path, text: str = "node-key\nolder-key\n") -> str:
    """Return a file with *text* that only we can read."""
    path = folder / "node.keys"
    path.touch(mode=0o600)
    path.write_text(text)
    return str(path)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return what a node speaks TLS with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def config_with(fake: FakeNeuron, **options: Any) -> GatewayConfig:
    """Return a configuration whose one neuron is *fake*, with *options*."""
    neuron = Neuron(fake.name, fake.url, **options)
    return msgspec.structs.replace(gateway_config(), neurons=(neuron,))


async def error_of_node(config: GatewayConfig) -> str | None:
    """Return what ``/fleet`` says is wrong with the only node."""
    async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
        await gateway.poller.first_round()
        async with session.get(f"{gateway.url}/fleet") as response:
            error: str | None = (await response.json())["nodes"][0]["error"]
            return error


async def test_a_node_gets_its_own_key_and_none_of_the_client_s(
    neuron: FakeNeuron, tmp_path: Path
) -> None:
    neuron.key = "node-key"
    headers = {
        "Authorization": "Bearer sk-of-the-client",
        "x-api-key": "sk-of-the-client",
        "x-cortex-key": "somebody-else",
        "x-cortex-priority": "9",
        "x-request-id": "mine",
    }

    async with (
        Gateway(config_with(neuron, key_file=key_file(tmp_path))) as gateway,
        aiohttp.ClientSession() as session,
        session.post(gateway.url + CHAT, json=BODY, headers=headers) as response,
    ):
        assert response.status == 200

    sent = neuron.received[0].headers
    assert (sent["authorization"], sent["x-request-id"]) == ("Bearer node-key", "mine")
    assert not {"x-api-key", "x-cortex-key", "x-cortex-priority"} & set(sent)


async def test_a_wrong_node_key_is_the_node_s_failure_and_not_the_client_s(
    neuron: FakeNeuron, tmp_path: Path
) -> None:
    config = config_with(neuron, key_file=key_file(tmp_path))
    async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
        await gateway.poller.first_round()
        neuron.key = "another-key"
        async with session.post(gateway.url + CHAT, json=BODY) as response:
            body = await response.json()

    assert (response.status, body["error"]["code"]) == (502, "node_failed")
    assert body["error"]["message"] == "node a wants another key: set key_file of this neuron"


async def test_a_node_that_wants_a_key_is_down_until_it_gets_one(
    neuron: FakeNeuron, logged: list[dict[str, Any]]
) -> None:
    neuron.key = "node-key"

    assert await error_of_node(config_with(neuron)) == (
        "node a wants another key: set key_file of this neuron"
    )
    assert any(entry["event"] == "node not polled" for entry in logged)


async def test_a_new_key_is_taken_at_a_reload(neuron: FakeNeuron, tmp_path: Path) -> None:
    neuron.key = "node-key"
    config = config_with(neuron, key_file=key_file(tmp_path))

    async with Gateway(config) as gateway:
        await until(lambda: gateway.fleet.node("a").takes_requests)
        await asyncio.to_thread(key_file, tmp_path, "newer-key")
        neuron.key = "newer-key"
        await gateway.reload(lambda: Written(config, BUILT_IN)).again()
        await gateway.poller.refresh("a")

        assert gateway.fleet.node("a").failures == 0


def credentials_of(neuron: Neuron) -> Credentials:
    """Return the credentials of *neuron*, read."""
    credentials = Credentials([neuron])
    credentials.read()
    return credentials


def test_a_broken_key_file_keeps_the_old_key_and_is_said_to_be(
    tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    neuron = Neuron("a", "http://a:1", key_file=key_file(tmp_path))
    credentials = credentials_of(neuron)

    key_file(tmp_path, "")
    found = credentials.reread([neuron])

    assert found["http://a:1"].headers == {"Authorization": "Bearer node-key"}
    assert "neuron a: " in logged[0]["why"]
    assert "holds no key" in logged[0]["why"]


def test_an_old_key_never_goes_to_a_new_address(tmp_path: Path) -> None:
    neuron = Neuron("a", "http://a:1", key_file=key_file(tmp_path))
    credentials = credentials_of(neuron)
    moved = msgspec.structs.replace(neuron, endpoint="http://b:1")

    key_file(tmp_path, "")

    with pytest.raises(ConfigError, match="neuron a: "):
        credentials.reread([moved])
    assert credentials.of("http://b:1") is None


def test_an_engine_s_broken_file_is_said_to_be_the_engine_s(tmp_path: Path) -> None:
    engine = Engine("ray", "http://ray:1", key_file=str(tmp_path / "none"))

    with pytest.raises(ConfigError, match=r"^engine ray: cannot read "):
        credentials_of(engine)


def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^neuron a: cannot read .*/none: No such file"):
        credentials_of(Neuron("a", "https://a:1", ca_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"^neuron a: .*keys holds no certificate in PEM form"):
        credentials_of(Neuron("a", "https://a:1", ca_file=key_file(tmp_path)))
    with pytest.raises(ConfigError, match=r"^neuron a: cannot read .*/none: No such file"):
        credentials_of(Neuron("a", "http://a:1", key_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("endpoint", "is_warned_of"),
    [("http://a.lan:1", True), ("https://a.lan:1", False), ("http://127.0.0.1:1", False)],
)
def test_a_key_that_crosses_the_network_unencrypted_is_warned_of(
    tmp_path: Path, logged: list[dict[str, Any]], endpoint: str, is_warned_of: bool
) -> None:
    Credentials([Neuron("a", endpoint, key_file=key_file(tmp_path))]).warn()

    assert bool(logged) == is_warned_of


async def test_a_node_is_spoken_to_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = server_context(*authority.certify())

    async with (
        FakeNeuron([MODEL], ssl_context=context) as neuron,
        Gateway(config_with(neuron, ca_file=str(authority.ca_file))) as gateway,
        aiohttp.ClientSession() as session,
        session.post(gateway.url + CHAT, json=BODY | {"stream": True}) as response,
    ):
        assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_a_certificate_of_an_unknown_authority_is_said_to_be(tmp_path: Path) -> None:
    context = server_context(*Authority(tmp_path).certify())
    other = Authority(tmp_path, "other")

    async with FakeNeuron(ssl_context=context) as neuron:
        error = await error_of_node(config_with(neuron, ca_file=str(other.ca_file)))
        unnamed = await error_of_node(config_with(neuron))

    untrusted = (
        "node a shows a certificate that is not trusted: unable to get local issuer certificate"
    )
    assert error == untrusted
    assert unnamed == untrusted


async def test_a_certificate_of_another_host_is_said_to_be(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = server_context(*authority.certify("other.lan"))

    async with FakeNeuron(ssl_context=context) as neuron:
        error = await error_of_node(config_with(neuron, ca_file=str(authority.ca_file)))

    assert error == (
        "node a shows a certificate that is not trusted: IP address mismatch, certificate is not "
        "valid for '127.0.0.1'"
    )


async def test_a_certificate_that_has_expired_is_said_to_have(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    context = server_context(*authority.certify(expires=yesterday))

    async with FakeNeuron(ssl_context=context) as neuron:
        error = await error_of_node(config_with(neuron, ca_file=str(authority.ca_file)))

    assert error == "node a shows a certificate that is not trusted: certificate has expired"


async def test_a_node_that_speaks_no_tls_is_said_not_to(neuron: FakeNeuron) -> None:
    neuron.url = neuron.url.replace("http:", "https:")

    error = await error_of_node(config_with(neuron))

    assert error is not None
    assert error.startswith("node a cannot be spoken to over TLS (")
