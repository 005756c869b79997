"""A neuron that listens with keys and TLS, or with neither where it should have them."""

import asyncio
import os
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from certificates import Authority
from cortex.runtime.config import AuthConfig, NeuronConfig, TlsConfig
from cortex.runtime.routes import SERVICES
from cortex.runtime.serving import Stop, bind, hangups, run
from fake_node import FakeNode, application


def key_file(folder: Path) -> str:
    """Return a file with a key."""
    path = folder / "keys"
    path.touch(mode=0o600)
    path.write_text("node-key")
    return str(path)


@asynccontextmanager
async def running(config: NeuronConfig, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Serve a fake node and yield its address."""
    stop, listener = Stop(), bind(host, 0)
    services = application(FakeNode("m"), config)[SERVICES]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run(services, listener, stop, 1.0, []))
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        stop.ask()


async def status_of(url: str, context: ssl.SSLContext | bool = True, **headers: str) -> int:
    """Return the status of a GET."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, ssl=context, headers=headers) as response,
    ):
        await response.read()
        return response.status


async def test_a_node_with_a_certificate_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.certify())
    trusting = ssl.create_default_context(cafile=authority.ca_file)

    async with running(NeuronConfig(tls=TlsConfig(certificate, key))) as address:
        assert await status_of(f"https://{address}/health", trusting) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status_of(f"https://{address}/health")
        with pytest.raises(aiohttp.ClientError):
            await status_of(f"http://{address}/health")


async def test_keys_hold_over_tls_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.certify())
    trusting = ssl.create_default_context(cafile=authority.ca_file)
    config = NeuronConfig(auth=AuthConfig(key_file(tmp_path)), tls=TlsConfig(certificate, key))

    async with running(config) as address:
        url = f"https://{address}/health"
        assert await status_of(url, trusting) == 401
        assert await status_of(url, trusting, Authorization="Bearer node-key") == 200


async def warnings_of(config: NeuronConfig, host: str) -> list[Any]:
    """Return what is warned of where *config* listens on *host*."""
    with capture_logs() as lines:
        async with running(config, host) as address:
            assert await status_of(f"http://{address}/health") in {200, 401}
    return [line["event"] for line in lines if line["log_level"] == "warning"]


async def test_an_open_port_without_keys_is_warned_of() -> None:
    warned = await warnings_of(NeuronConfig(), "0.0.0.0")

    assert warned == ["anybody who reaches this port may use it: set key_file in [auth]"]


async def test_nothing_is_warned_of_on_loopback_or_with_keys(tmp_path: Path) -> None:
    guarded = NeuronConfig(auth=AuthConfig(key_file(tmp_path)))

    assert await warnings_of(NeuronConfig(), "127.0.0.1") == []
    assert await warnings_of(guarded, "0.0.0.0") == []


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN], ids=["usual", "nohup"])
async def test_sighup_is_heard(disposition: signal.Handlers) -> None:
    before = signal.signal(signal.SIGHUP, disposition)
    try:
        heard = hangups()
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            await heard.wait()
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)
