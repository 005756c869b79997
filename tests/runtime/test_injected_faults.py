"""Every fault, at every boundary, in real device processes: what the table of the design promises.

Each test holds the fault against the same four things: what the stream that met it saw, that a
stream on the other device lost no token, that the model serves again, and (``faulty_node``) that no
process and no descriptor is left.
"""

import asyncio
import re
from collections.abc import Iterator

import pytest

from cortex.ipc.errors import ApiError, NodeFailed, Overloaded, Unloadable
from cortex.ipc.messages import Ping
from cortex.ipc.node_api import LoadRequest
from cortex.runtime.device_state import Cause
from cortex.runtime.model_state import State
from engine_fakes import answer
from faulty_node import LONG_TOKENS, PROMPT, FaultyNode, faulty_node, says
from forked import forking
from supervisor_bench import A, B
from supervisor_fakes import eventually


@pytest.fixture(scope="module", autouse=True)
def prepared() -> Iterator[None]:
    with forking("cortex.runtime.preload"):
        yield


async def stream_both(node: FaultyNode) -> tuple[list[int], ApiError | None]:
    """Stream from both devices at once; return what A's said, once B's was found whole."""
    await node.load(A, 0)
    await node.load(B, 1)
    async with asyncio.TaskGroup() as tasks:
        hit = tasks.create_task(says(node.generate(A)))
        spared = tasks.create_task(says(node.generate(B)))
    assert spared.result() == (answer(PROMPT, LONG_TOKENS), None)
    return hit.result()


def is_a_beginning(tokens: list[int], number: int) -> bool:
    return tokens == answer(PROMPT, LONG_TOKENS)[:number]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("forward:error@9", NodeFailed, "a step of .* failed: RuntimeError"),
        ("forward:oom@9", Overloaded, "ran out of memory"),
        ("forward:nan@9", NodeFailed, "a NaN or an infinity"),
        ("sample:error@9", NodeFailed, "a step of .* failed: RuntimeError"),
        ("sample:oom@9", Overloaded, "ran out of memory"),
    ],
)
async def test_a_fault_of_a_step_ends_its_stream_and_the_process_goes_on(
    fault: str, error: type[ApiError], words: str
) -> None:
    async with faulty_node(f"cpu:0/{fault}") as node:
        tokens, failure = await stream_both(node)

        assert is_a_beginning(tokens, 8)
        assert isinstance(failure, error)
        assert re.search(words, str(failure))
        assert await node.serves_again(A)
        assert [device.restarts for device in node.supervisor.devices] == [0, 0]


async def test_a_nan_ends_one_stream_and_none_beside_it() -> None:
    async with faulty_node("cpu:0/forward:nan@1") as node:
        await node.load(A, 0)
        async with asyncio.TaskGroup() as tasks:
            hit = tasks.create_task(says(node.generate(A, 200)))
            spared = tasks.create_task(says(node.generate(A, 200)))

    assert "a NaN" in str(hit.result()[1])
    assert spared.result() == (answer(PROMPT, 200), None)


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ("forward:hang@9", Cause.HUNG, "it hung: a step took more than 4 s"),
        ("sample:hang@9", Cause.HUNG, "it hung: a step took more than 4 s"),
        ("forward:abort@9", Cause.DIED, "was killed by SIGABRT"),
        ("sample:abort@9", Cause.DIED, "was killed by SIGABRT"),
        ("forward:segv@9", Cause.DIED, "was killed by SIGSEGV"),
        ("forward:lost@9", Cause.FAILED, "an injected illegal memory access"),
    ],
)
async def test_a_fault_of_the_process_ends_its_streams_and_the_model_comes_back(
    fault: str, cause: Cause, words: str
) -> None:
    async with faulty_node(f"cpu:0/{fault}") as node:
        tokens, failure = await stream_both(node)

        assert is_a_beginning(tokens, 8)
        assert isinstance(failure, NodeFailed)
        assert words in str(failure)
        assert await node.serves_again(A)
        assert [device.losses for device in node.supervisor.devices] == [{cause: 1}, {}]


async def test_garbage_from_the_device_ends_its_life() -> None:
    async with faulty_node("cpu:0/event:garbage@4") as node:
        await node.load(A, 0)
        stream = node.generate(A)
        pinging = [node.supervisor.devices[0].ask(Ping, timeout_seconds=20.0) for _ in range(5)]
        await asyncio.gather(*pinging, return_exceptions=True)
        _, failure = await says(stream)

        assert "not an event" in str(failure)
        assert await node.serves_again(A)
        assert node.supervisor.devices[0].losses == {Cause.PROTOCOL: 1}


async def test_garbage_to_the_device_ends_its_life_because_it_may_have_been_a_request() -> None:
    async with faulty_node("cpu:0/command:garbage@2") as node:
        _, failure = await stream_both(node)

        assert "not a command" in str(failure)
        assert await node.serves_again(A)
        assert node.supervisor.devices[0].losses == {Cause.FAILED: 1}


@pytest.mark.parametrize("fault", ["ring:full@3", "loop:busy@3"])
async def test_a_supervisor_that_does_not_listen_for_a_while_loses_no_token(fault: str) -> None:
    async with faulty_node(f"cpu:0/{fault}") as node:
        assert await stream_both(node) == (answer(PROMPT, LONG_TOKENS), None)
        assert [device.restarts for device in node.supervisor.devices] == [0, 0]


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("load:oom", "insufficient_memory", "ran out of memory"),
        ("load:error", "load_failed", "RuntimeError"),
    ],
)
async def test_a_load_that_goes_wrong_spares_the_streams_of_its_device(
    fault: str, kind: str, words: str
) -> None:
    async with faulty_node(f"cpu:0/{fault}@2") as node:
        await node.load(A, 0)
        async with asyncio.TaskGroup() as tasks:
            spared = tasks.create_task(says(node.generate(A)))
            with pytest.raises(Unloadable, match=words) as failed:
                await node.load(B, 0)

        assert failed.value.kind == kind
        assert spared.result() == (answer(PROMPT, LONG_TOKENS), None)
        assert node.supervisor.models[B].servable.reason == "failed"
        await node.load(B, 0)
        assert await node.serves_again(B)


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ("load:hang", Cause.HUNG, "it hung: a load made no progress for 4 s"),
        ("load:abort", Cause.DIED, "was killed by SIGABRT"),
        ("load:segv", Cause.DIED, "was killed by SIGSEGV"),
        ("load:lost", Cause.FAILED, "an injected illegal memory access"),
    ],
)
async def test_a_load_that_takes_its_process_along_has_failed_and_works_the_next_time(
    fault: str, cause: Cause, words: str
) -> None:
    async with faulty_node(f"cpu:0/{fault}@2") as node:
        await node.load(A, 0)
        with pytest.raises(NodeFailed, match=words):
            await node.load(B, 0)

        assert await node.serves_again(A)
        await node.load(B, 0)
        assert await node.serves_again(B)
        assert node.supervisor.devices[0].losses == {cause: 1}


async def test_a_download_that_breaks_off_is_a_failed_load_that_can_be_tried_again() -> None:
    async with faulty_node("download:broken") as node:
        with pytest.raises(Unloadable, match="broke off"):
            await node.load(A, 0)

        await node.load(A, 0)
        assert await node.serves_again(A)


async def test_a_model_that_is_evicted_in_mid_download_is_gone_and_the_next_one_loads() -> None:
    async with faulty_node("download:hang") as node:
        await node.supervisor.load(LoadRequest(A, devices=[0]))
        model = node.supervisor.models[A]
        await eventually(lambda: model.progress and model.progress.bytes_done, "the download")
        await node.supervisor.unload(A)

        assert A not in node.supervisor.models
        await node.load(A, 0)
        assert await node.serves_again(A)


async def test_a_model_that_is_evicted_in_mid_load_is_gone_once_the_load_is_over() -> None:
    async with faulty_node("cpu:0/load:hang") as node:
        await node.supervisor.load(LoadRequest(A, devices=[0]))
        model = node.supervisor.models[A]
        await eventually(lambda: model.state is State.LOADING, "the load to begin")
        await node.supervisor.unload(A)

        assert A not in node.supervisor.models
        await node.load(A, 0)
        assert await node.serves_again(A)


async def test_a_device_that_hangs_four_times_is_given_up_and_an_operator_gets_it_back() -> None:
    async with faulty_node("cpu:0/forward:hangx4") as node:
        await node.load(A, 0)
        device = node.supervisor.devices[0]
        for _ in range(4):
            await eventually(
                lambda: node.supervisor.models[A].state is State.LOADED, "the model", 40.0
            )
            await says(node.generate(A, 5))

        assert device.losses == {Cause.HUNG: 4}
        assert node.supervisor.models[A].servable.reason == "device_poisoned"
        await node.supervisor.restart_device(0)
        assert await node.serves_again(A)
