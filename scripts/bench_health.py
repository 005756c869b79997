"""Measure how fast a neuron answers those who watch it while it is as busy as it can be.

Two devices decode streams without a pause, a third model is loaded and unloaded beside them, and
one more process asks GET /health and GET /models at a fixed rate over connections that stay open.
A stall counts for every question that should have been asked while it lasted. "late" is how late
the machine woke the asking process, which no server could do anything about. Exit status 1 where
p99 is not below the target.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Self

from answers import Address, Trouble, answered, events
from local_neuron import SAME_FILE, LocalNeuron, until

PATHS = ("/health", "/models")
NEVER_ENDING = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0.7, "stream": True}


def main() -> int:
    """Print the table, then one line of JSON; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench-health",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument(
        "--rate", type=float, default=50.0, help="questions per second (default 50)"
    )
    parser.add_argument("--streams", type=int, default=4, help="on each device (default 4)")
    parser.add_argument("--target-ms", type=float, default=20.0, help="for the p99 (default 20)")
    parser.add_argument("--idle", action="store_true", help="without any load, to compare with")
    options = parser.parse_args()
    *served, loaded_beside = SAME_FILE
    try:
        with LocalNeuron("bench-health", served) as neuron:
            neuron.wait_until_loaded()
            load = Load(neuron, loaded_beside, 0 if options.idle else options.streams)
            with load:
                result = measure(neuron.place, options.seconds, options.rate)
    except Trouble as exc:
        print(f"bench-health: {exc}", file=sys.stderr)
        return 1
    shown = {**result, "tokens": load.tokens, "loads": load.loads, "seconds": options.seconds}
    print_table(result, load, options.seconds)
    print(json.dumps(shown))
    return 0 if all(result[path]["p99"] < options.target_ms for path in PATHS) else 1


def measure(place: Address, seconds: float, rate: float) -> dict[str, dict[str, float]]:
    """Return figures in milliseconds by path; asked from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        taken, late = pool.submit(ask, place, seconds, rate).result()
    return {path: figures(values) for path, values in taken.items()} | {"late": figures(late)}


def ask(place: Address, seconds: float, rate: float) -> tuple[dict[str, list[float]], list[float]]:
    """Return how long every answer took, by path, and how late every question was, in ms."""
    connections = {path: http.client.HTTPConnection(place.host, place.port) for path in PATHS}
    taken: dict[str, list[float]] = {path: [] for path in PATHS}
    late: list[float] = []
    start = time.perf_counter()
    for turn in range(int(seconds * rate)):
        due = start + turn / rate
        now = time.perf_counter()
        if now < due:
            time.sleep(due - now)
            late.append((time.perf_counter() - due) * 1e3)
        path = PATHS[turn % len(PATHS)]
        begun = min(time.perf_counter(), due) if now > due else time.perf_counter()
        connections[path].request("GET", path)
        response = connections[path].getresponse()
        response.read()
        if response.status != 200:
            raise Trouble(f"{path} answered {response.status}")
        taken[path].append((time.perf_counter() - begun) * 1e3)
    return taken, late


def figures(values: list[float]) -> dict[str, float]:
    """Return count, median, p99 and maximum."""
    ordered = sorted(values) or [0.0]
    return {
        "count": len(values),
        "p50": statistics.median(ordered),
        "p99": ordered[int(len(ordered) * 0.99)],
        "max": ordered[-1],
    }


@dataclass
class Load:
    """Keeps every device of *neuron* busy while its block runs: streams, and a model's comings."""

    neuron: LocalNeuron
    loaded_beside: str
    streams: int
    tokens: int = 0
    loads: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        if self.streams:
            models = [model for model in self.neuron.models for _ in range(self.streams)]
            work = [(self._stream, (model, n)) for n, model in enumerate(models)]
            self._threads = [threading.Thread(target=run, args=args) for run, args in work]
            self._threads.append(threading.Thread(target=self._come_and_go))
        for thread in self._threads:
            thread.start()
        until(lambda: self.tokens >= self.streams and (self.loads or not self.streams), "the load")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _stream(self, model: str, number: int) -> None:
        prompt = [{"role": "user", "content": f"Tell story {number}, a very long one."}]
        body = {"model": model, "messages": prompt, **NEVER_ENDING}
        while not self._stop.is_set():
            with answered(self.neuron.place, "/v1/chat/completions", body) as response:
                for event in events(response):
                    if event["choices"]:
                        with self._lock:
                            self.tokens += 1
                    if self._stop.is_set():
                        break

    def _come_and_go(self) -> None:
        model = {"model_id": self.loaded_beside}
        while not self._stop.is_set():
            self.neuron.post("/models/load", {**model, "kv_cache_mb": 64, "wait": True})
            self.neuron.post("/models/unload", model)
            self.loads += 1


def print_table(result: dict[str, dict[str, float]], load: Load, seconds: float) -> None:
    """Show the figures."""
    print(f"{'milliseconds':<16}{'count':>8}{'p50':>10}{'p99':>10}{'max':>10}")
    for name, row in result.items():
        numbers = "".join(f"{row[key]:>10.2f}" for key in ("p50", "p99", "max"))
        print(f"{name:<16}{row['count']:>8.0f}{numbers}")
    print(
        f"meanwhile {load.streams} streams on each of {len(load.neuron.models)} devices, "
        f"{load.tokens / seconds:.0f} tokens/s, {load.loads} loads and unloads"
    )


if __name__ == "__main__":
    sys.exit(main())
