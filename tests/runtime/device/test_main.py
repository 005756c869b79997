"""A whole device process says Hello, works over the real channel and ring, exits in order."""

import asyncio
import contextlib
import multiprocessing
import select
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from cortex.ipc.channel import SupervisorEnd
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.heartbeat import HeartbeatPage
from cortex.ipc.messages import (
    PROTOCOL_VERSION,
    Bye,
    Command,
    Embed,
    Embedded,
    EngineReport,
    Event,
    Failed,
    Generate,
    Hello,
    LoadModel,
    ModelLoaded,
    Ping,
    Pong,
    Shutdown,
)
from cortex.ipc.ring import Flag, TokenConsumer, TokenRing
from cortex.ipc.taps import listen, socket_path
from cortex.models.execution import Execution
from cortex.runtime.device.main import execution_of
from device_child import run
from engine_fakes import answer, greedy, vector


class Life:
    """One device process and both ways to it."""

    def __init__(self, channel: SupervisorEnd, ring: TokenRing, process: ForkServerProcess) -> None:
        self._channel = channel
        self._consumer = TokenConsumer(ring)
        self.process = process

    async def send(self, *commands: Command) -> None:
        for command in commands:
            await self._channel.send(command)

    async def receive(self) -> Event:
        """Return the next event that somebody asked for."""
        async with asyncio.timeout(60):
            while isinstance(event := await self._channel.receive(), EngineReport):
                pass
            return event

    def tokens_until_finished(self) -> list[int]:
        tokens: list[int] = []
        while True:
            assert select.select([self._consumer], [], [], 20.0)[0], "no tokens come"
            for record in self._consumer.take():
                if record.flags & Flag.TOKEN:
                    tokens.append(record.token_id)
                if record.flags & Flag.FINISH:
                    return tokens

    def exit_code(self) -> int | None:
        self.process.join(30.0)
        return self.process.exitcode

    def close(self) -> None:
        self._consumer.close()


Start = Callable[[str], contextlib.AbstractAsyncContextManager[Life]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    @asynccontextmanager
    async def start(device_name: str) -> AsyncIterator[Life]:
        with zmq.asyncio.Context() as context:
            channel, ring = SupervisorEnd(context), TokenRing(1024)
            heartbeat = HeartbeatPage()
            process = multiprocessing.get_context("forkserver").Process(
                target=run,
                args=(device_name, channel.address, ring, heartbeat, tmp_path),
                kwargs={"preloaded": True, "server_threads": 1},
            )
            process.start()
            life = Life(channel, ring, process)
            try:
                yield life
            finally:
                process.kill()
                process.join(20.0)
                life.close()
                ring.close()
                heartbeat.close()
                channel.close()

    return start


async def test_it_says_hello_loads_answers_and_exits_with_zero(start: Start) -> None:
    async with start("cpu:1") as life:
        hello = await life.receive()
        assert isinstance(hello, Hello)
        assert (hello.protocol, hello.device, hello.pid) == (
            PROTOCOL_VERSION,
            "cpu:1",
            life.process.pid,
        )
        assert (hello.preloaded, hello.server_threads) == (True, 1)

        await life.send(LoadModel(1, "m", "/m"))
        assert isinstance(await life.receive(), ModelLoaded)
        await life.send(Generate(2, 7, "m", [1, 2, 3], greedy(8)), Ping(3))

        assert life.tokens_until_finished() == answer([1, 2, 3], 8)
        assert await life.receive() == Pong(3)
        await life.send(Shutdown(4))
        assert await life.receive() == Bye(4)
        assert life.exit_code() == 0


def test_the_models_are_told_what_the_options_say_of_a_gpu() -> None:
    options = EngineOptions(batch_invariant=True, attention="torch", cuda_graphs=False)

    assert execution_of(options) == Execution("torch", is_batch_invariant=True, has_graphs=False)
    assert execution_of(EngineOptions()) == Execution()


async def test_its_embeddings_come_over_the_real_channel(start: Start) -> None:
    async with start("cpu:0") as life:
        await life.receive()
        await life.send(LoadModel(1, "m", "/m"))
        await life.receive()
        await life.send(Embed(2, "m", [4, 9, 2], "mean"), Embed(3, "m", [4, 9, 2], "last"))

        for command_id, expected in (
            (2, vector([4, 9, 2], "mean")),
            (3, vector([4, 9, 2], "last")),
        ):
            embedded = await life.receive()
            assert isinstance(embedded, Embedded)
            assert embedded.command_id == command_id
            assert array("f", embedded.vector).tolist() == pytest.approx(expected)


async def test_a_device_that_is_not_there_says_so_and_exits_with_71(start: Start) -> None:
    async with start("cuda:99") as life:
        assert isinstance(await life.receive(), Hello)

        failed = await life.receive()

        assert isinstance(failed, Failed)
        assert (failed.code, failed.fatal) == ("device_lost", True)
        assert life.exit_code() == 71


async def test_its_steps_can_be_tapped(start: Start, tmp_path: Path) -> None:
    async with start("cpu:0") as life:
        await life.receive()
        await life.send(LoadModel(1, "m", "/m"))
        await life.receive()
        assert socket_path(tmp_path, "cpu:0").exists()
        seen = listen(tmp_path, ["step"])

        # Long enough for the subscription to arrive while it runs.
        await life.send(Generate(2, 7, "m", [1], greedy(2000)))
        topic, message = await asyncio.to_thread(next, seen)

        assert topic == "step"
        assert message["process"] == "cpu:0"
        assert (message["message"]["model"], message["message"]["sequences"]) == ("m", 1)
