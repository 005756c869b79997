"""``kill -9`` in mid-stream of every process: what DESIGN's fault table promises."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import urllib3

from stack import MODEL, Stack, descendants, is_alive, title, until

LONG = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell a very long story."}],
    "max_tokens": 4000,
    "temperature": 0.7,
    "ignore_eos": True,
    "stream": True,
}


def a_running_stream(stack: Stack) -> Generator[str, None, None]:
    """Start a stream and return it once text has come."""
    lines = stack.stream("/v1/chat/completions", LONG)
    for line in lines:
        if '"content":"' in line and '"content":""' not in line:
            return lines
    raise AssertionError("the stream ended before any text")


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def kill_and_wait(stack: Stack, victim: str) -> None:
    """Kill *victim*, and wait until another device process has the model again."""
    killed, device = stack.pid_of(victim), stack.pid_of("neuron cpu:0")
    os.kill(killed, signal.SIGKILL)
    until(lambda: not is_alive(device), "the device process to die")
    until(lambda: stack.pids_of("neuron cpu:0"), "another device process")
    until(lambda: is_loaded(stack), "the model to come back")


def is_loaded(stack: Stack) -> bool:
    models = stack.get("/models", base=stack.neuron_url) or []
    return any(model["id"] == MODEL and model["status"] == "loaded" for model in models)


def answers(stack: Stack) -> bool:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 3}
    return stack.post("/v1/chat/completions", body)[0] == 200


@pytest.mark.parametrize("victim", ["neuron cpu:0", "neuron fork server"])
def test_a_killed_process_ends_its_streams_with_an_error_and_the_model_comes_back(
    fragile_stack: Stack, victim: str
) -> None:
    lines = a_running_stream(fragile_stack)

    kill_and_wait(fragile_stack, victim)

    rest = list(lines)
    assert '"error"' in rest[-1]
    assert '"code":"node_failed"' in rest[-1]
    assert "data: [DONE]" not in rest
    assert answers(fragile_stack)


def test_killing_a_device_process_leaves_the_other_device_alone(fragile_stack: Stack) -> None:
    other = fragile_stack.pid_of("neuron cpu:1")

    kill_and_wait(fragile_stack, "neuron cpu:0")

    assert fragile_stack.pid_of("neuron cpu:1") == other


def test_a_device_killed_three_times_costs_no_descriptor_and_no_memory(
    fragile_stack: Stack,
) -> None:
    daemons = (fragile_stack.process.pid, fragile_stack.pid_of("cortex.runtime"))
    files = shared_memory()
    kill_and_wait(fragile_stack, "neuron cpu:0")
    descriptors_before = [descriptors(pid) for pid in daemons]
    memory_before = [resident_bytes(pid) for pid in daemons]

    for _ in range(2):
        kill_and_wait(fragile_stack, "neuron cpu:0")

    until(
        lambda: all(
            descriptors(pid) <= before
            for pid, before in zip(daemons, descriptors_before, strict=True)
        ),
        "descriptors to be given back",
    )
    for pid, before in zip(daemons, memory_before, strict=True):
        assert resident_bytes(pid) < before + 8 * 2**20
    assert shared_memory() == files


def test_a_killed_supervisor_takes_its_device_processes_with_it(fragile_stack: Stack) -> None:
    lines = a_running_stream(fragile_stack)
    supervisor = fragile_stack.pid_of("cortex.runtime")
    children = descendants(supervisor)
    titles = {title(pid) for pid in children}
    assert {"neuron fork server", "neuron cpu:0", "neuron cpu:1"} <= titles
    before = shared_memory()

    os.kill(supervisor, signal.SIGKILL)

    rest = list(lines)
    assert '"error"' in rest[-1]
    assert "data: [DONE]" not in rest
    until(lambda: not any(map(is_alive, children)), "the device processes to die", 5.0)
    assert shared_memory() <= before


def test_a_killed_gateway_takes_the_whole_stack_with_it(fragile_stack: Stack) -> None:
    lines = a_running_stream(fragile_stack)
    children = descendants(fragile_stack.process.pid)

    fragile_stack.process.kill()
    fragile_stack.process.wait(10)

    with pytest.raises(urllib3.exceptions.HTTPError):
        list(lines)
    until(lambda: not any(map(is_alive, children)), "everything else to die", 15.0)


def test_sigterm_lets_a_running_request_finish(fragile_stack: Stack) -> None:
    body = LONG | {"max_tokens": 150}
    lines = fragile_stack.stream("/v1/chat/completions", body)
    next(lines)

    fragile_stack.process.send_signal(signal.SIGTERM)

    assert list(lines)[-1] == "data: [DONE]"
    assert fragile_stack.process.wait(60) == 0
