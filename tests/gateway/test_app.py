"""The daemon's life: ports, drain, readiness."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest

from cortex.gateway.app import CannotListen, Gateway
from cortex.gateway.background import Background
from cortex.gateway.config import Listening
from cortex.gateway.door import Door
from cortex.gateway.exchange import Exchange
from cortex.ipc.errors import ShuttingDown
from fakes import QUICK, FakeNeuron, gateway_config, until

CHAT = "/v1/chat/completions"
STREAM: dict[str, Any] = {"model": "qwen3-8b", "messages": [], "stream": True}


async def test_while_it_drains_what_runs_finishes_and_what_is_new_is_503(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + CHAT, json=STREAM) as running,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(gateway.drain())
        await until(lambda: gateway.door.is_closed)
        async with session.post(gateway.url + CHAT, json=STREAM) as refused:
            body = await refused.json()
        async with session.get(gateway.url + "/health") as health:
            state = await health.json()
        neuron.may_finish.set()
        text = await running.text()

    assert (refused.status, body["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["Retry-After"] == "5"
    assert state["status"] == "draining"
    assert text.endswith("data: [DONE]\n\n")


async def test_what_outlasts_the_drain_ends_with_an_error(
    neuron: FakeNeuron, session: aiohttp.ClientSession, logged: list[dict[str, Any]]
) -> None:
    neuron.may_finish.clear()
    hasty = gateway_config(neuron, timeouts=msgspec.structs.replace(QUICK, drain_seconds=0.1))

    async with Gateway(hasty) as gateway:
        response = await session.post(gateway.url + CHAT, json=STREAM)
        await gateway.drain()
    text = await response.text()

    await until(neuron.cancelled.is_set)
    assert orjson.loads(text.split("data: ")[-1])["error"]["code"] == "shutting_down"
    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    assert (line["status"], line["code"]) == (503, "shutting_down")


async def test_an_idle_gateway_drains_at_once(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        async with asyncio.timeout(1):
            await gateway.drain()


async def test_a_door_counts_those_who_fail() -> None:
    door = Door()

    with pytest.raises(ZeroDivisionError):
        async with door.enter():
            raise ZeroDivisionError

    assert door.inside == 0


async def test_a_closed_door_lets_nobody_in() -> None:
    door = Door()
    await door.close(within_seconds=1)

    with pytest.raises(ShuttingDown):
        async with door.enter():
            pass


async def test_a_door_leaves_the_timeouts_of_others_alone() -> None:
    with pytest.raises(TimeoutError):
        async with Door().enter():
            raise TimeoutError


@pytest.mark.parametrize("which", ["listen", "metrics_listen"])
async def test_a_port_that_is_taken_is_one_sentence(neuron: FakeNeuron, which: str) -> None:
    taken = neuron.url.removeprefix("http://")
    free = Listening("127.0.0.1:0", "127.0.0.1:0")
    ports = msgspec.structs.replace(free, **{which: taken})
    config = msgspec.structs.replace(gateway_config(neuron), gateway=ports)

    with pytest.raises(CannotListen, match=f"cannot listen on {taken}: address already in use"):
        async with Gateway(config):
            pass


async def test_a_name_that_nobody_knows_is_one_sentence(neuron: FakeNeuron) -> None:
    ports = Listening("host.invalid:0", "127.0.0.1:0")
    config = msgspec.structs.replace(gateway_config(neuron), gateway=ports)

    with pytest.raises(CannotListen, match=r"cannot listen on host\.invalid:0: "):
        async with Gateway(config):
            pass


async def test_an_open_port_without_keys_is_warned_of(
    neuron: FakeNeuron, logged: list[dict[str, Any]]
) -> None:
    ports = Listening("0.0.0.0:0", "127.0.0.1:0")
    async with Gateway(msgspec.structs.replace(gateway_config(neuron), gateway=ports)):
        pass
    async with Gateway(gateway_config(neuron)):
        pass

    warnings = [entry["event"] for entry in logged if entry["log_level"] == "warning"]
    assert warnings == ["anybody who reaches this port may use it"]


async def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    neuron: FakeNeuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        async with Gateway(gateway_config(neuron)) as gateway:
            ready = manager.recv(99)
            await gateway.drain()
            stopping = manager.recv(99)

    assert (ready, stopping) == (b"READY=1", b"STOPPING=1")


async def test_small_packets_are_not_held_back(
    neuron: FakeNeuron, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = Exchange.headers

    def spy(exchange: Exchange) -> dict[str, str]:
        transport = exchange.client._request.transport
        assert transport is not None
        connection = transport.get_extra_info("socket")
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return original(exchange)

    monkeypatch.setattr(Exchange, "headers", spy)
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + CHAT, json=STREAM) as response,
    ):
        await response.read()

    assert seen == [1]


async def test_a_bug_in_the_request_path_is_500_and_logged(
    neuron: FakeNeuron,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[dict[str, Any]],
) -> None:
    def bug(_: Exchange) -> dict[str, str]:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Exchange, "headers", bug)
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + CHAT, json=STREAM) as response,
    ):
        text = await response.text()

    assert (response.status, "secret" in text) == (500, False)
    assert [entry["log_level"] for entry in logged if entry["event"] == "request failed"] == [
        "error"
    ]
    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    assert (line["status"], line["code"]) == (500, "internal_error")


async def test_a_bug_in_mid_stream_ends_it_with_an_error_frame(
    neuron: FakeNeuron, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> bytes:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("cortex.gateway.dialects.chat.Verbatim.feed", bug)
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + CHAT, json=STREAM) as response,
    ):
        text = await response.text()

    assert '"code":"internal_error"' in text
    assert "secret" not in text


async def test_a_background_task_that_fails_is_not_lost() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    async def block() -> None:
        async with Background() as background:
            background.start(fails(), "fails")
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await block()

    assert caught.group_contains(ZeroDivisionError)


async def test_background_tasks_end_with_their_block() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Background() as background:
        background.start(waits(), "waits")
        await asyncio.sleep(0)

    assert ended.is_set()
