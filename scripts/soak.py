"""Send mixed traffic at a stack for minutes, and prove that every request ends and nothing grows.

The stack is `cortex up` with two CPU devices, started here. Time goes in rounds: for some seconds
clients send requests of every kind (long, short, structured, tools, cancelled, slow readers, with a
common head, wrong ones, ...) while a second model is loaded and unloaded and, with --kills, device
processes are killed. Then all are waited for, and the idle stack is looked at: every request has
ended exactly once, no request is in flight, every KV block is free, no zombie is there; memory and
descriptors of each process are noted. After the first quarter of the rounds, which warm up, they
may not grow by more than --growth-mb and a few descriptors. The same --seed draws the same
requests.

    scripts/soak --minutes 3 --kills 2

Exit status 0 where all of it held, 1 where something was violated. Ctrl-C ends it after the round
that runs, with what was seen so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from answers import MODEL, Address, Trouble
from local_neuron import until
from processes import Holdings, family, is_zombie, named
from quickstart import Stack, fetched, free_addresses
from soak_ends import End, send
from soak_requests import FAULTS, GUEST, Request, draw

ROUND_SECONDS = 20.0
SETTLING_SECONDS = 60.0
"""What an idle stack gets to give everything back, and a killed device to come again."""
ENOUGH_ROUNDS = 6
"""After the warm-up, to judge growth by."""
PATIENCE_SECONDS = 0.5
"""How long a client waits that was told to come again."""
FEW_DESCRIPTORS = 4
ENOUGH_SHARED = 20
"""Prompts with a common head, for one of them to have found it in the prefix cache."""
KILLS_PER_DEVICE = 3
"""The fourth in ten minutes is one too many: the device would be given up, as designed."""
LOADED_WITH = {
    "NEURON_MODELS__0__MODEL_ID": MODEL,
    "NEURON_MODELS__0__TOOL_PROMPT": "hermes",
    "NEURON_MODELS__0__MAX_SEQUENCES": "8",
    "NEURON_MODELS__0__KV_CACHE_MB": "128",
}
"""A KV cache takes its memory when its blocks are first used: a small one is used up while the soak
warms up, so that what grows afterwards is none. The embedded model's template knows no tools: they
are told to it in the prompt."""
DEVICES = ("neuron cpu:0", "neuron cpu:1")


@dataclass(frozen=True)
class Sample:
    """What one process held when the stack was idle."""

    pid: int
    holdings: Holdings


@dataclass
class Findings:
    """What has been seen so far."""

    ends: list[End] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    rounds: int = 0
    kills: int = 0
    loads: int = 0


def main() -> int:
    """Return the exit status."""
    options = arguments()
    findings = Findings()
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    os.environ.update(LOADED_WITH)  # the neuron's, by way of cortex up
    names = ("--listen", "--neuron-listen", "--metrics-listen")
    try:
        addresses = free_addresses(dict.fromkeys(names, Address("127.0.0.1", 0)))
        with Stack(addresses, "--devices", "cpu:0,cpu:1") as stack:
            stack.wait_until_serving()
            Soak(stack, options, findings, stop).run()
    except Trouble as exc:
        findings.violations.append(f"the stack: {exc}")
    judge_growth(findings, options.growth_mb * 2**20)
    judge_prefixes(findings)
    judge_lives(findings)
    report(findings, as_json=options.json)
    return 1 if findings.violations else 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--clients", type=int, default=8, help="at the same time (default 8)")
    parser.add_argument("--kills", type=int, default=0, help="of device processes (default 0)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default 1)")
    parser.add_argument(
        "--growth-mb", type=float, default=8.0, help="memory a process may gain (default 8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON after the tables")
    return parser.parse_args()


class Soak:
    """The rounds."""

    def __init__(
        self,
        stack: Stack,
        options: argparse.Namespace,
        findings: Findings,
        stop: threading.Event,
    ) -> None:
        self._stack = stack
        self._options = options
        self._findings = findings
        self._stop = stop
        self._rounds = max(4, round(options.minutes * 60 / (ROUND_SECONDS + 2)))
        self._killed_in = killing_rounds(self._rounds, options.kills, options.seed)

    def run(self) -> None:
        """Run every round, or until told to stop."""
        for number in range(self._rounds):
            if self._stop.is_set():
                return
            self._round(number)
            self._findings.rounds += 1
            print(self._line(), flush=True)

    def _round(self, number: int) -> None:
        over = time.monotonic() + ROUND_SECONDS
        victims = self._killed_in.get(number, [])
        with ThreadPoolExecutor(self._options.clients + 2) as pool:
            clients = [
                pool.submit(self._client, number, client, over, bool(victims))
                for client in range(self._options.clients)
            ]
            beside = [pool.submit(self._come_and_go, over), pool.submit(self._kill, victims, over)]
            for done in itertools.chain(clients, beside):
                done.result()
        self._settle(number)

    def _client(self, number: int, client: int, over: float, is_killed: bool) -> None:
        for turn in itertools.count():
            if time.monotonic() > over or self._stop.is_set():
                return
            chance = random.Random(f"{self._options.seed} {number} {client} {turn}")  # noqa: S311
            request = draw(chance)
            if is_killed:
                request = forgiving(request)
            end = send(self._stack.gateway, request)
            self._findings.ends.append(end)
            if end.wrong:
                self._violated(number, f"{request.kind}: {end.wrong}")
            if end.how in FAULTS:
                self._stop.wait(PATIENCE_SECONDS)

    def _come_and_go(self, over: float) -> None:
        """Load and unload the guest, also while requests for it run."""
        for turn in itertools.count():
            if time.monotonic() > over - 2 or self._stop.is_set():
                break
            self._control("load", {"model_id": GUEST, "kv_cache_mb": 64, "wait": True})
            self._findings.loads += 1
            time.sleep(1.5)
            self._control("unload", {"model_id": GUEST, "force": turn % 2 == 0})
        self._control("unload", {"model_id": GUEST, "force": True})

    def _control(self, verb: str, body: dict[str, Any]) -> None:
        """Ask the neuron; what it refuses because of a kill or a running request is no matter."""
        path = f"/models/{verb}"
        end = send(self._stack.neuron, Request(verb, path, json.dumps(body).encode()))
        if end.how in {"broken", "silence"}:
            self._findings.violations.append(f"{verb}: {end.wrong}")

    def _kill(self, victims: Sequence[str], over: float) -> None:
        for number, victim in enumerate(victims, 1):
            time.sleep(max(0.0, over - time.monotonic()) * number / (len(victims) + 2))
            if pid := named(self._stack.process.pid).get(victim):
                os.kill(pid, signal.SIGKILL)
                self._findings.kills += 1

    def _settle(self, number: int) -> None:
        """Wait until the stack is idle and whole again, and look at it."""
        try:
            until(self._is_idle, "", SETTLING_SECONDS)
        except Trouble:
            self._violated(number, f"not idle after {SETTLING_SECONDS:.0f} s: {self._busy()}")
        for pid in family(self._stack.process.pid):
            if is_zombie(pid):
                self._violated(number, f"zombie {pid}")
        for name, pid in named(self._stack.process.pid).items():
            self._findings.samples[name].append(Sample(pid, Holdings.of(pid)))

    def _is_idle(self) -> bool:
        return self._stack.is_serving() and not self._busy()

    def _busy(self) -> list[str]:
        """Return what is not as it is in an idle stack."""
        health = fetched(self._stack.neuron, "/health")
        if health is None:
            return ["/health does not answer"]
        busy = [d["name"] for d in health["devices"] if d["state"] != "ready"]
        for model in health["models"]:
            held = {what: model[what] for what in ("in_flight", "queue_depth")}
            held["MB of KV"] = model["kv_budget_mb"] - model["kv_available_mb"]
            busy += [f"{model['id']}: {what} {count}" for what, count in held.items() if count]
        return busy

    def _violated(self, number: int, what: str) -> None:
        self._findings.violations.append(f"round {number + 1}: {what}")

    def _line(self) -> str:
        found = self._findings
        return (
            f"round {found.rounds} of {self._rounds}: {len(found.ends)} requests ended, "
            f"{found.loads} loads, {found.kills} kills, {len(found.violations)} violations"
        )


def killing_rounds(rounds: int, kills: int, seed: int) -> dict[int, list[str]]:
    """Return whom each round kills: never a device more often than it may fall."""
    victims = list(itertools.islice(itertools.cycle(DEVICES), min(kills, 2 * KILLS_PER_DEVICE)))
    chance = random.Random(seed)  # noqa: S311
    chosen: dict[int, list[str]] = defaultdict(list)
    for victim in victims:
        chosen[chance.randrange(rounds)].append(victim)
    return chosen


def forgiving(request: Request) -> Request:
    """Return *request* as it may end in a round with a kill."""
    return replace(request, may_fail_with=request.may_fail_with | FAULTS | {"model_not_found"})


def newest_life(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of the process that has the name now: a killed one's do not count."""
    return [sample for sample in samples if sample.pid == samples[-1].pid]


def growth(values: Sequence[int]) -> int | None:
    """Return by how much *values* grew after the first quarter; None for too few of them."""
    warm = values[max(1, len(values) // 4) :]
    if len(warm) < ENOUGH_ROUNDS:
        return None
    third = max(1, len(warm) // 3)
    return round(statistics.median(warm[-third:]) - statistics.median(warm[:third]))


def judge_growth(findings: Findings, allowed_bytes: float) -> None:
    """Add a violation for each process that holds more and more."""
    for name, memory, descriptors in grown(findings):
        if memory is not None and memory > allowed_bytes:
            findings.violations.append(f"{name} has gained {memory / 2**20:.1f} MiB of memory")
        if descriptors is not None and descriptors > FEW_DESCRIPTORS:
            findings.violations.append(f"{name} has gained {descriptors} descriptors")


def judge_prefixes(findings: Findings) -> None:
    """Add a violation where no prompt with the common head found anything of it computed."""
    ends = [end for end in findings.ends if end.request.kind == "shared" and end.how != "left"]
    if len(ends) >= ENOUGH_SHARED and not any(end.cached_tokens for end in ends):
        findings.violations.append("no prompt's head was ever found in the prefix cache")


def judge_lives(findings: Findings) -> None:
    """Add a violation for each process that was replaced though nobody killed it."""
    for name, samples in findings.samples.items():
        deaths = len({sample.pid for sample in samples}) - 1
        if deaths > findings.kills:
            findings.violations.append(f"{name} died {deaths} times, {findings.kills} were killed")


def grown(findings: Findings) -> Iterator[tuple[str, int | None, int | None]]:
    """Yield each process with the bytes and descriptors that it has gained."""
    for name, samples in findings.samples.items():
        held = [sample.holdings for sample in newest_life(samples)]
        yield (
            name,
            growth([it.anonymous_bytes for it in held]),
            growth([it.descriptors for it in held]),
        )


def report(findings: Findings, *, as_json: bool) -> None:
    """Print what was seen."""
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    for end in findings.ends:
        ends[end.request.kind][end.how] += 1
    print(f"\n{'kind':<12}{'requests':>9}  ends")
    for kind, hows in sorted(ends.items()):
        said = ", ".join(f"{how} {count}" for how, count in hows.most_common())
        print(f"{kind:<12}{hows.total():>9}  {said}")
    print(f"\n{'process':<36}{'MiB':>8}{'gained':>8}{'descriptors':>13}{'gained':>8}{'threads':>9}")
    for name, memory, descriptors in grown(findings):
        last = findings.samples[name][-1].holdings
        print(
            f"{name:<36}{last.anonymous_bytes / 2**20:>8.1f}"
            f"{'?' if memory is None else f'{memory / 2**20:.1f}':>8}{last.descriptors:>13}"
            f"{'?' if descriptors is None else descriptors:>8}{last.threads:>9}"
        )
    if any(memory is None for _, memory, _ in grown(findings)):
        print("\n?: lived for too few rounds to say whether it grows; more --minutes tell")
    cached = sum(end.cached_tokens for end in findings.ends)
    print(f"\n{cached:,} tokens of prompts were found in the prefix cache, as far as streams tell")
    print(f"\n{len(findings.violations)} violations in {findings.rounds} rounds")
    for what, count in Counter(findings.violations).most_common(30):
        print(f"  {count} x {what}")
    if as_json:
        print(json.dumps(as_plain(findings, ends)))


def as_plain(findings: Findings, ends: dict[str, Counter[str]]) -> dict[str, Any]:
    """Return the findings as JSON has them."""
    return {
        "rounds": findings.rounds,
        "kills": findings.kills,
        "loads": findings.loads,
        "ends": ends,
        "gained": {name: [memory, few] for name, memory, few in grown(findings)},
        "cached_tokens": sum(end.cached_tokens for end in findings.ends),
        "violations": findings.violations,
    }


if __name__ == "__main__":
    sys.exit(main())
