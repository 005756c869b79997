"""Let each fault happen once to a neuron of its own, and measure what it costs.

A neuron with two CPU devices and a model on each is started for every fault. Streams run on both
devices; the fault strikes the first. Measured are: how long until its streams end, in seconds after
the kill or after their last token; until its model answers again; how many requests of the other
device were lost; and how many bytes were left behind: KV blocks, files in /dev/shm and processes.

    scripts/fault-table                    every fault, about ten seconds each
    scripts/fault-table device hang nan    only these

Exit status 1 where something was lost on the other device or left behind, or did not come back.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from answers import Trouble, answered, events
from local_neuron import SAME_FILE, LocalNeuron, until
from processes import Holdings, family, is_alive, named, shared_memory_bytes

STREAMS = 2
"""On each device."""
STEP = 40
"""The step that injected faults strike, when the streams run."""
DEADLINE_SECONDS = 2.0
"""What a step may take before it counts as hanging; 60 s unless configured."""
RECOVERY_SECONDS = 90.0
CHAT = "/v1/chat/completions"
STRUCK, OTHER = SAME_FILE[:2]
PRESSING = {"messages": [{"role": "user", "content": "Tell a story."}], "ignore_eos": True}


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a process is killed, or something is ordered before the start."""

    words: str
    kills: str | None = None
    orders: str | None = None
    spares_others: bool = True


FAULTS = {
    "device": Fault("a device process is killed", kills="neuron cpu:0"),
    "fork-server": Fault(
        "the fork server is killed", kills="neuron fork server", spares_others=False
    ),
    "supervisor": Fault(
        "the supervisor is killed and started again",
        kills="neuron supervisor",
        spares_others=False,
    ),
    "abort": Fault("a device process aborts in a step", orders=f"cpu:0/forward:abort@{STEP}"),
    "lost": Fault("a step meets a lost context", orders=f"cpu:0/forward:lost@{STEP}"),
    "oom": Fault("a step runs out of memory", orders=f"cpu:0/forward:oom@{STEP}"),
    "hang": Fault(
        f"a step hangs (deadline {DEADLINE_SECONDS:.0f} s)", orders=f"cpu:0/forward:hang@{STEP}"
    ),
    "nan": Fault("a step's logits are NaN", orders=f"cpu:0/forward:nan@{STEP}"),
}


@dataclass(frozen=True)
class Cost:
    """What a fault did; seconds, requests and bytes."""

    ends_after_seconds: float
    serves_after_seconds: float
    lost_elsewhere: int | None
    left_bytes: int


class Stream(threading.Thread):
    """A stream that is read to its end, again and again until ``stop`` is set."""

    def __init__(self, neuron: LocalNeuron, model: str) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.has_begun = threading.Event()
        self.last_token = 0.0
        self.ended = 0.0
        self.lost = 0
        self._neuron = neuron
        self._body = {"model": model, **PRESSING, "max_tokens": 600, "stream": True}

    def run(self) -> None:
        """Read until stopped, or until something is lost."""
        while not (self.stop.is_set() or self.lost):
            self._read()

    def _read(self) -> None:
        try:
            with answered(self._neuron.place, CHAT, self._body) as response:
                for event in events(response):
                    if "error" in event:
                        break
                    self.last_token = time.monotonic()
                    if event["choices"] and event["choices"][0]["delta"].get("content"):
                        self.has_begun.set()
                    if self.stop.is_set() or event["choices"][0].get("finish_reason"):
                        return
        except (OSError, http.client.HTTPException, Trouble):
            pass
        self.lost += 1
        self.ended = time.monotonic()


def main() -> int:
    """Print the table, then one line of JSON; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/fault-table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    names = parser.parse_args().faults or list(FAULTS)
    if unknown := set(names) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    print("| fault | its streams end after | serves again after | lost elsewhere | left behind |")
    print("|---|---|---|---|---|", flush=True)
    costs: dict[str, Cost | None] = {}
    for name in names:
        try:
            costs[name] = cost_of(FAULTS[name])
        except Trouble as exc:
            costs[name] = None
            print(f"fault-table: {name}: {exc}", file=sys.stderr)
        print(row(FAULTS[name], costs[name]), flush=True)
    print(json.dumps({name: cost and vars(cost) for name, cost in costs.items()}))
    return 0 if all(cost and is_as_promised(cost) for cost in costs.values()) else 1


def is_as_promised(cost: Cost) -> bool:
    """Whether nothing was lost elsewhere and nothing is left behind."""
    return not cost.lost_elsewhere and not cost.left_bytes


def row(fault: Fault, cost: Cost | None) -> str:
    """Return a line of the table."""
    if cost is None:
        return f"| {fault.words} | | never | | |"
    lost = "its own too" if cost.lost_elsewhere is None else f"{cost.lost_elsewhere}"
    return (
        f"| {fault.words} | {cost.ends_after_seconds:.2f} s | {cost.serves_after_seconds:.2f} s "
        f"| {lost} | {cost.left_bytes} bytes |"
    )


def cost_of(fault: Fault) -> Cost:
    """Let *fault* happen to a neuron of its own; raise Trouble where it does not recover."""
    environment = {"NEURON_ENGINE__STEP_DEADLINE_SECONDS": f"{DEADLINE_SECONDS}"}
    if fault.orders:
        environment["NEURON_TEST_FAULTS"] = fault.orders
    shared_before = shared_memory_bytes()
    with LocalNeuron("fault-table", (STRUCK, OTHER), **environment) as neuron:
        neuron.wait_until_loaded()
        before = list(family(neuron.process.pid))
        struck = started(neuron, STRUCK)
        others = started(neuron, OTHER)
        struck_at = kill(neuron, fault.kills) if fault.kills else None
        until(lambda: any(stream.lost for stream in struck), "the fault", RECOVERY_SECONDS)
        for stream in struck:
            stream.stop.set()
            stream.join()
        began = struck_at or max(stream.last_token for stream in struck)
        ended = max(stream.ended for stream in struck)
        until(lambda: answers(neuron, STRUCK), "another answer", RECOVERY_SECONDS)
        serves = time.monotonic()
        stop(others)
        lost = sum(stream.lost for stream in others)
        until(lambda: answers(neuron, OTHER), "the other device", RECOVERY_SECONDS)
        left = left_behind(neuron, before) + max(0, shared_memory_bytes() - shared_before)
    return Cost(
        ends_after_seconds=round(max(0.0, ended - began), 3),
        serves_after_seconds=round(serves - began, 3),
        lost_elsewhere=lost if fault.spares_others else None,
        left_bytes=left,
    )


def started(neuron: LocalNeuron, model: str) -> list[Stream]:
    """Return streams of *model* that have begun to speak."""
    streams = [Stream(neuron, model) for _ in range(STREAMS)]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.has_begun.wait(RECOVERY_SECONDS)
    return streams


def stop(streams: list[Stream]) -> None:
    """Let *streams* go."""
    for stream in streams:
        stream.stop.set()
    for stream in streams:
        stream.join()


def kill(neuron: LocalNeuron, name: str) -> float:
    """Kill the process called *name*; return when."""
    os.kill(named(neuron.process.pid)[name], signal.SIGKILL)
    when = time.monotonic()
    if name == "neuron supervisor":
        neuron.start_again()
    return when


def answers(neuron: LocalNeuron, model: str) -> bool:
    """Whether *model* gives an answer now."""
    try:
        neuron.post(CHAT, {"model": model, **PRESSING, "max_tokens": 1})
    except (OSError, http.client.HTTPException, Trouble):
        return False
    return True


def left_behind(neuron: LocalNeuron, before: list[int]) -> int:
    """Return the bytes of KV that are not free, and of processes that should have gone."""
    now = set(family(neuron.process.pid))
    orphans = [pid for pid in before if pid not in now and is_alive(pid)]
    held: list[int] = []

    def is_free() -> bool:
        health = neuron.get("/health") or {"models": []}
        held[:] = [model["kv_budget_mb"] - model["kv_available_mb"] for model in health["models"]]
        return len(held) == len(neuron.models) and not any(held)

    try:
        until(is_free, "the KV cache", 10.0)
    except Trouble:
        return sum(held) * 2**20 or 1
    return sum(bytes_of(pid) for pid in orphans)


def bytes_of(pid: int) -> int:
    """Return what *pid* holds; nothing once it has gone."""
    try:
        return Holdings.of(pid).anonymous_bytes
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
