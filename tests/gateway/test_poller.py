"""What the poller keeps true."""

import asyncio

import aiohttp
import msgspec
import pytest
from aiohttp import web
from structlog.typing import EventDict

from cortex.gateway.app import Gateway
from cortex.ipc.node_api import DeviceInfo
from fakes import QUICK, FakeNeuron, gateway_config, until


async def test_what_a_node_has_is_known_after_the_first_round(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        node = gateway.fleet.node("a")

    assert (node.is_healthy, [model.id for model in node.models]) == (True, ["qwen3-8b"])


async def test_models_that_vanish_from_a_node_vanish_here(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        neuron.models.clear()
        await gateway.poller.refresh("a")

        assert gateway.fleet.node("a").models == ()


async def test_a_node_goes_down_and_comes_back(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        neuron.is_out_of_order = True
        await until(lambda: not gateway.fleet.node("a").is_healthy)
        why = gateway.fleet.node("a").error
        neuron.is_out_of_order = False
        await until(lambda: gateway.fleet.node("a").is_healthy)

    assert why == "node a broke the connection"


async def test_a_slow_node_delays_nobody() -> None:
    async with FakeNeuron(["m"], "slow") as slow, FakeNeuron(["m"], "b") as b:
        slow.may_poll.clear()
        async with Gateway(gateway_config(slow, b)) as gateway:
            await gateway.poller.refresh("b")
            await gateway.poller.refresh("b")

            assert not gateway.fleet.node("slow").is_healthy
            assert gateway.fleet.node("slow").failures == 0


async def test_a_node_that_is_not_there_is_down(neuron: FakeNeuron) -> None:
    await neuron.stop()

    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()

        assert not gateway.fleet.node("a").is_healthy


@pytest.mark.parametrize(
    "body",
    [b"<html>", b'{"models": 3}', b"[{}]", b'[{"id": "\xff"}]', b"[" * 100_000],
    ids=["html", "object", "empty", "not-utf-8", "deep"],
)
async def test_a_node_that_talks_nonsense_is_down(body: bytes) -> None:
    class Odd(FakeNeuron):
        async def _models(self, request: web.Request) -> web.Response:
            await self._polled(request)
            return web.Response(body=body)

    async with Odd() as odd, Gateway(gateway_config(odd)) as gateway:
        await gateway.poller.first_round()
        error = gateway.fleet.node("a").error

    assert error is not None
    assert error.startswith("GET /models: ")


async def test_a_node_that_drains_gets_nothing_new(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.draining = True

    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.post(gateway.url + "/v1/completions", json={"model": "qwen3-8b"}) as response,
    ):
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (503, "recovering")
    assert neuron.received == []


async def test_going_up_and_down_is_logged_once(
    neuron: FakeNeuron, logged: list[dict[str, object]]
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.refresh("a")
        await gateway.poller.refresh("a")

    changes = [entry for entry in logged if entry["event"] == "node went up or down"]
    assert [(entry["node"], entry["is_up"]) for entry in changes] == [("a", True)]


async def test_who_looks_does_not_wait_long_for_a_node_in_doubt(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.settled()
        neuron.may_poll.clear()
        gateway.poller.doubt("a")

        async with asyncio.timeout(5):
            await gateway.poller.settled()

        neuron.may_poll.set()


async def test_a_node_in_doubt_is_polled_at_once(neuron: FakeNeuron) -> None:
    rarely = msgspec.structs.replace(QUICK, poll_seconds=3600)
    async with Gateway(gateway_config(neuron, timeouts=rarely)) as gateway:
        await gateway.poller.settled()
        neuron.models.clear()
        gateway.poller.doubt("a")
        await gateway.poller.settled()

        assert gateway.fleet.node("a").models == ()


async def test_which_devices_a_node_has_is_known_after_the_first_round(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        discovery = gateway.fleet.node("a").discovery

    assert discovery is not None
    assert discovery.devices == neuron.devices


async def test_a_node_that_cannot_say_what_it_has_serves_all_the_same(
    neuron: FakeNeuron, logged: list[EventDict]
) -> None:
    neuron.devices = None

    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        await gateway.poller.refresh("a")
        node = gateway.fleet.node("a")

    assert (node.takes_requests, node.failures, node.discovery) == (True, 0, None)
    assert [line["why"] for line in logged if line["event"] == "node not discovered"] == [
        "the driver does not answer"
    ]


async def test_what_a_node_has_is_asked_until_it_says_it(neuron: FakeNeuron) -> None:
    devices, neuron.devices = neuron.devices, None

    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        neuron.devices = devices
        await until(lambda: gateway.fleet.node("a").discovery is not None)


@pytest.mark.parametrize(("uptime_seconds", "is_asked"), [(0.5, True), (2.0, False)])
async def test_a_node_that_was_restarted_is_asked_again_what_it_has(
    neuron: FakeNeuron, uptime_seconds: float, is_asked: bool
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        neuron.devices = [DeviceInfo(0, "cuda:0", 24576)]
        neuron.uptime_seconds = uptime_seconds
        await gateway.poller.refresh("a")
        discovery = gateway.fleet.node("a").discovery

    assert discovery is not None
    assert (discovery.devices == neuron.devices) == is_asked
