"""Measure what the gateway costs, beside asking the node directly and beside LiteLLM's proxy.

    scripts/bench-gateway                                           cortex and the node
    scripts/bench-gateway --peer VENV/bin/litellm                   LiteLLM's proxy too

The node is one process that answers with prepared bytes (stub_node.py); the gateways know it under
two addresses, so that there is something to choose. Each gateway is one process and asks for a key;
that of cortex has a budget, and its sessions, ledger, metrics and log are on, as always. LiteLLM
has no database, so it keeps no budgets and counts nobody's tokens: that is in its favour.

In each round each of them gets the same requests in turn, and who is first changes:

    p50, p99        from the first byte sent to the last one read, one request after another
    first byte      from the first byte sent to the first one of a stream's body
    requests/s      with so many open at a time that one process is busy; where the client and the
                    node take as much as the gateway, less would be theirs than on more processors
    CPU             processor time of the gateway's processes, in the kernel too, as /proc tells
    of a chunk      that of streams side by side, by their words; a word comes every few ms
    memory          proportional set size after the requests that warmed everything up

What is "added" is what the node itself did not take in the same round. A ratio cortex / LiteLLM is
of what both added where the node takes some of it, else of the figures themselves. Medians of the
rounds, with the least and the most.

Exit status 1 where an answer was refused, broke off or lacks words, which is then said.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import Address, Trouble
from bench_stack import cpu_name
from children import Child
from gateway_litellm import LiteLlm
from gateway_load import Ended, ask, chat, request
from local_gateway import LocalGateway
from processes import family, is_alive, proportional_bytes, scheduled_seconds
from quickstart import free_addresses
from stub_node import MODEL, WORDS

KEY = "sk-bench-gateway"
KEYS = (
    "[entitlements]",
    "[[entitlements.keys]]",
    f'key = "{KEY}"',
    'id = "bench"',
    "budget = { tokens = 1000000000000, per_seconds = 86400 }",
)
SMALL_BYTES = 1_000
LARGE_BYTES = 200_000
WARMING_REQUESTS = 1_000
FIRST_BYTES = 50
"""Streams of one word, one after another."""
ADDED = ("1 kB, p50", "1 kB, p99", "200 kB, p50", "200 kB, p99", "first byte, p50")
"""Figures of which the node has its own part."""

Turn = Mapping[str, float]
"""What one round through one way took, by figure."""
Round = Mapping[str, Turn]


@dataclass(frozen=True)
class Way:
    """Where requests go; *pid* is that of the gateway in between, if there is one."""

    place: Address
    pid: int | None = None

    def cpu_seconds(self) -> float:
        """Return what the gateway has taken so far."""
        return sum(map(scheduled_seconds, self._processes()))

    def memory_bytes(self) -> float:
        """Return what the gateway holds."""
        return sum(map(proportional_bytes, self._processes()))

    def _processes(self) -> list[int]:
        assert self.pid is not None, "a node costs what it costs"
        return [pid for pid in family(self.pid) if is_alive(pid)]


def main() -> int:
    """Print the table, then one line of JSON; return the exit status."""
    options = arguments()
    try:
        with ExitStack() as stack:
            ways = started(stack, options)
            memory = {name: warmed(way, options) for name, way in ways.items()}
            rounds = [one_round(ways, number, options) for number in range(options.rounds)]
    except Trouble as exc:
        print(f"bench-gateway: {exc}", file=sys.stderr)
        return 1
    result = {**about(options), **figures(rounds), "memory, MiB": told(memory)}
    print_table(result)
    print(json.dumps(result))
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench-gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--peer", type=Path, metavar="PROGRAM", help="LiteLLM's, where it is installed")
    add("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    add("--requests", type=int, default=300, help="one after another, of 1 kB (default 300)")
    add("--open-requests", type=int, default=2000, help="several at a time (default 2000)")
    add("--concurrency", type=int, default=16, help="open at a time, streams too (default 16)")
    add("--tokens", type=int, default=200, help="words of each stream (default 200)")
    add("--word-ms", type=float, default=10.0, help="between two words of one (default 10)")
    return parser.parse_args()


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return where and how it was measured."""
    asked = {name: value for name, value in vars(options).items() if name != "peer"}
    machine = f"{platform.machine()}, {cpu_name()}"
    return {"machine": machine, "date": time.strftime("%Y-%m-%d"), **asked}


def started(stack: ExitStack, options: argparse.Namespace) -> dict[str, Way]:
    """Return the ways by name, all of them open; raise Trouble."""
    node = free_addresses({"its port": Address("127.0.0.1", 0)})["its port"]
    stub = stack.enter_context(Child("bench-gateway-node", "stub_node.py"))
    names = {"alpha": node, "beta": Address("127.0.0.2", node.port)}
    hosts = [place.host for place in names.values()]
    stub.ask("serve", hosts=hosts, port=node.port, seconds_per_word=options.word_ms / 1e3)
    cortex = stack.enter_context(LocalGateway("bench-gateway", names, {}, KEYS))
    cortex.wait_until_serving(MODEL)
    ways = {"direct": Way(node), "cortex": Way(cortex.place, cortex.process.pid)}
    if options.peer:
        peer = stack.enter_context(LiteLlm(options.peer, MODEL, list(names.values()), KEY))
        peer.wait_until_serving()
        ways["LiteLLM"] = Way(peer.place, peer.process.pid)
    return ways


def warmed(way: Way, options: argparse.Namespace) -> float | None:
    """Ask until everything is warm; return the MiB that the gateway has then."""
    several(way, SMALL_BYTES, options.concurrency, WARMING_REQUESTS)
    several(way, SMALL_BYTES, 1, 1, stream=True, max_tokens=2)
    return None if way.pid is None else way.memory_bytes() / 2**20


def told(memory: Mapping[str, float | None]) -> dict[str, float]:
    """Return what is known."""
    return {name: value for name, value in memory.items() if value is not None}


def one_round(ways: Mapping[str, Way], number: int, options: argparse.Namespace) -> Round:
    """Return the turn of each way; who is first changes with *number*."""
    first = number % len(ways)
    order = [*ways, *ways][first : first + len(ways)]
    return {name: turn(ways[name], options) for name in order}


def turn(way: Way, options: argparse.Namespace) -> Turn:
    """Measure one way once; times in milliseconds and microseconds as figures say."""
    small = several(way, SMALL_BYTES, 1, options.requests)
    large = several(way, LARGE_BYTES, 1, max(options.requests // 3, 1))
    first = several(way, SMALL_BYTES, 1, FIRST_BYTES, stream=True, max_tokens=1)
    found = {
        "1 kB, p50": quantile([each.seconds for each in small], 50) * 1e3,
        "1 kB, p99": quantile([each.seconds for each in small], 99) * 1e3,
        "200 kB, p50": quantile([each.seconds for each in large], 50) * 1e3,
        "200 kB, p99": quantile([each.seconds for each in large], 99) * 1e3,
        "first byte, p50": quantile([each.first for each in first], 50) * 1e3,
    }
    return {**found, **together(way, options), **streams(way, options)}


def together(way: Way, options: argparse.Namespace) -> Turn:
    """Measure requests that are open at the same time."""
    count, cpu = options.open_requests, Cpu(way)
    began = time.perf_counter()
    several(way, SMALL_BYTES, options.concurrency, count)
    rate = count / (time.perf_counter() - began)
    return {"requests/s": rate, **cpu.told("CPU of a request", count)}


def streams(way: Way, options: argparse.Namespace) -> Turn:
    """Measure streams side by side."""
    count, cpu = options.concurrency, Cpu(way)
    ended = several(way, SMALL_BYTES, count, count, stream=True, max_tokens=options.tokens)
    last = max(each.seconds for each in ended)
    return {"streams, s": last, **cpu.told("CPU of a chunk", count * options.tokens)}


class Cpu:
    """What the gateway on *way* takes from now on, if there is one."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._before = self._now()

    def _now(self) -> float | None:
        return None if self._way.pid is None else self._way.cpu_seconds()

    def told(self, figure: str, count: int) -> Turn:
        """Return the microseconds of each of *count*, under that name."""
        now = self._now()
        if now is None or self._before is None:
            return {}
        return {figure: (now - self._before) / count * 1e6}


def several(way: Way, body_bytes: int, sessions: int, count: int, **rest: Any) -> list[Ended]:
    """Ask *count* requests of *body_bytes*, *sessions* at a time; raise Trouble."""
    bodies = [chat(MODEL, body_bytes, number, **rest) for number in range(sessions)]
    ended = ask(way.place, [request(way.place, KEY, body) for body in bodies], count)
    words = rest.get("max_tokens", WORDS)
    if wrong := [each.words for each in ended if each.words != words]:
        raise Trouble(f"an answer through {way.place} has {wrong[0]} words, not {words}")
    return ended


def quantile(values: Sequence[float], share: int) -> float:
    """Return what *share* per cent of *values* do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the medians, what gateways add to the node, and what of that is whose."""
    ways = list(rounds[0])
    gateways = [way for way in ways if way != "direct"]
    result: dict[str, Any] = {
        "medians": {
            way: {name: statistics.median(each[way][name] for each in rounds) for name in named}
            for way, named in rounds[0].items()
        },
        "added": {
            way: {name: spread([added(each, way, name) for each in rounds]) for name in ADDED}
            for way in gateways
        },
    }
    if "LiteLLM" in ways:
        names = rounds[0]["cortex"]
        result["cortex / LiteLLM"] = {
            name: spread([ratio(each, name) for each in rounds]) for name in names
        }
    return result


def added(each: Round, way: str, name: str) -> float:
    """Return what *way* took more than the node in one round."""
    return each[way][name] - each["direct"][name]


def ratio(each: Round, name: str) -> float:
    """Return what cortex took, of what LiteLLM did in the same round."""
    if name in ADDED:
        return added(each, "cortex", name) / added(each, "LiteLLM", name)
    return each["cortex"][name] / each["LiteLLM"][name]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


UNITS = dict.fromkeys(ADDED, "ms") | {
    "requests/s": "",
    "CPU of a request": "us",
    "streams, s": "",
    "CPU of a chunk": "us",
}


def print_table(result: Mapping[str, Any]) -> None:
    """Show the figures."""
    medians, ratios = result["medians"], result.get("cortex / LiteLLM", {})
    print(f"{result['machine']}, {result['date']}")
    print(
        f"{result['concurrency']} at a time, streams of {result['tokens']} words, one every "
        f"{result['word_ms']:g} ms; {result['rounds']} rounds\n"
    )
    ways = [way for way in ("direct", "cortex", "LiteLLM") if way in medians]
    print(f"{'':<24}" + "".join(f"{way:>11}" for way in ways) + "   added by cortex", end="")
    print("             cortex / LiteLLM" if ratios else "")
    for name, unit in UNITS.items():
        shown = "".join(_cell(medians[way].get(name)) for way in ways)
        more = _range(result["added"]["cortex"].get(name), ".2f")
        print(f"{f'{name}, {unit}' if unit else name:<24}{shown}   {more:<28}", end="")
        print(_range(ratios.get(name), ".3f"))
    held = "".join(_cell(result["memory, MiB"].get(way)) for way in ways)
    print(f"{'memory, MiB':<24}{held}")
    if not ratios:
        print("\nLiteLLM was left out: --peer says where it is.")


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:,.2f}':>11}"


def _range(values: Mapping[str, float] | None, form: str) -> str:
    if values is None:
        return ""
    least, most = format(values["least"], form), format(values["most"], form)
    return f"{format(values['median'], form)} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())
