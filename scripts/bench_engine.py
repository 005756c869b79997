"""Measure our engine against llama.cpp and transformers, on one file and the same prompts.

Each engine lives in a process of its own (``engine_child.py``), with as many threads, and computes
only when it is its turn. Every round takes all rows in order, each with all engines, after a read
of the memory bandwidth. Only figures of one round may be divided by one another: a ratio is the
median of the rounds' ratios, with the least and the most of them. A round before the first one
warms up.

    prefill      from a prompt of 512 tokens to its first token
    B@C          B sequences decode greedily, with contexts of C tokens that were computed before
    load         a new process, the file in the system's cache: from the call to the first token;
                 what it holds then (PSS), and the most it ever held (RSS); ours / it shall be small

What is not installed is left out: pip install -e '.[bench]'. A cell that takes too long is left out
too, and said. Leave the machine alone meanwhile: what others took of it is said at the end. Ctrl-C
shows what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import Trouble
from bench_stack import cpu_name, read_bandwidth
from children import Child, Late
from engine_table import OURS, Results, Spread, plain, table
from processes import busy_seconds, cpu_seconds

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import EMBEDDED_MODEL
from cortex.runtime.config import NeuronConfig
from cortex.runtime.host import Host
from cortex.runtime.model_files import find

PEERS = {"llama.cpp": ("llama_cpp",), "transformers": ("transformers", "accelerate")}
"""The modules that each takes."""
SEQUENCES = 32
ROOM_TOKENS = 2560
"""Of each sequence's context."""
LOAD_ROUNDS = 3
IDLE_SHARE = 0.02
"""What engines that wait may compute, as a share of the time, before it is said."""
LOAD = "load"


@dataclass(frozen=True)
class Row:
    """A line of the table, and what a child is asked for it."""

    name: str
    question: str
    details: dict[str, int]

    @property
    def title(self) -> str:
        """Its name in the table."""
        return f"{self.name}, tokens/s"


def decoding(batch: int, context: int, steps: int) -> Row:
    """Return the row of *batch* sequences that decode."""
    details = {"batch": batch, "context": context, "steps": steps}
    return Row(f"{batch}@{context}", "decode", details)


ROWS = (
    Row("prefill", "prefill", {"tokens": 512}),
    decoding(1, 64, 48),
    decoding(8, 64, 24),
    decoding(32, 64, 12),
    decoding(1, 2048, 32),
    decoding(8, 2048, 12),
    decoding(32, 2048, 4),
)
NAMES = [*(row.name for row in ROWS), LOAD]


def main() -> int:
    """Print the table, then one line of JSON; return the exit status."""
    options = arguments()
    results = Results()
    busy, began = busy_seconds(), time.monotonic()
    try:
        bench = Bench(options, results)
        with contextlib.suppress(KeyboardInterrupt):
            bench.run()
    except Trouble as exc:
        print(f"bench-engine: {exc}", file=sys.stderr)
        return 1
    took = time.monotonic() - began
    others = (busy_seconds() - busy - own_seconds()) / took / (os.cpu_count() or 1)
    results.remarks.append(f"others took {max(0.0, others):.0%} of the processors meanwhile")
    show(bench, results, took)
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench-engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    add("--peers", type=listed(PEERS), default=[*PEERS], help=f"of {', '.join(PEERS)}")
    add("--rows", type=listed(NAMES), default=NAMES, help=f"of {', '.join(NAMES)}")
    add("--model", default=EMBEDDED_MODEL, help="a GGUF file, or an id as in a load")
    add("--quant", help="have llama.cpp write the file anew, once: Q4_0, Q4_1, Q8_0 or Q4_K")
    add("--threads", type=int, default=Host.read().cores, help="of each engine (default all)")
    add("--cell-seconds", type=float, default=180.0, help="for one engine's row (default 180)")
    add("--skip", action="append", default=[], metavar="ENGINE:ROW", help="leave out a cell")
    add("--json", type=Path, metavar="FILE", help="write the JSON there, too")
    return parser.parse_args()


def listed(known: Sequence[str] | dict[str, Any]) -> Any:
    """Return what parses a list of *known* names, for argparse."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


class Bench:
    """The rounds."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self._options = options
        self._results = results
        self.threads: int = options.threads
        self.json_file: Path | None = options.json
        self.peers = [peer for peer in options.peers if self._is_installed(peer)]
        self.path = model_file(options.model)
        if options.quant:
            self.path = requantised(self.path, options.quant)
        self._children: dict[str, Child] = {}
        self._stack = ExitStack()

    @property
    def engines(self) -> list[str]:
        """Ours first."""
        return [OURS, *self.peers]

    def run(self) -> None:
        """Run every round; results grow as they come."""
        rows = [row for row in ROWS if row.name in self._options.rows]
        with self._stack:
            for number in range(self._options.rounds + 1 if rows else 0):
                bandwidth = read_bandwidth()
                for row in rows:
                    for engine in self.engines:
                        self._measure(row, engine, number)
                if number:
                    self._results.bandwidths.append(bandwidth)
                print(f"round {number} of {self._options.rounds}", file=sys.stderr, flush=True)
            self._children.clear()
        if LOAD in self._options.rows:
            for number in range(min(LOAD_ROUNDS, self._options.rounds)):
                for engine in self.engines:
                    self._measure_load(engine, number)

    def _is_installed(self, peer: str) -> bool:
        missing = [name for name in PEERS[peer] if importlib.util.find_spec(name) is None]
        if missing:
            self._results.remarks.append(f"without {peer}: {missing[0]} is not installed")
        return not missing

    def _measure(self, row: Row, engine: str, number: int) -> None:
        """Fill a cell of round *number*; the first round is not counted."""
        with self._left_out_if_it_fails(row.title, engine, row.name) as is_wanted:
            if not is_wanted:
                return
            child = self._child(engine)
            with self._others_idle(engine):
                answer = child.ask(row.question, self._options.cell_seconds, **row.details)
            if number:
                self._results.add(row.title, engine, number, answer["tokens"] / answer["seconds"])
            if answer.get("choosing_seconds") is not None:
                share = answer["choosing_seconds"] / answer["seconds"]
                self._results.choosing_shares[engine].append(share)

    def _measure_load(self, engine: str, number: int) -> None:
        with self._left_out_if_it_fails(LOAD, engine, LOAD) as is_wanted:
            if not is_wanted:
                return
            with Child(f"bench-engine-load-{engine}", "engine_child.py", engine) as child:
                answer = self._load(child, sequences=1)
            self._results.add("load, s", engine, number, answer["seconds"])
            self._results.add("held, MiB", engine, number, answer["held_bytes"] / 2**20)
            self._results.add("most ever held, MiB", engine, number, answer["peak_bytes"] / 2**20)

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, title: str, engine: str, row: str) -> Iterator[bool]:
        """Yield whether the cell is wanted; one that fails is left out from then on."""
        if f"{engine}:{row}" in self._options.skip:
            self._results.left_out[title, engine] = "asked for with --skip"
        try:
            yield (title, engine) not in self._results.left_out
        except Trouble as exc:
            self._results.left_out[title, engine] = str(exc)
            self._results.values[title].pop(engine, None)
            if isinstance(exc, Late):
                self._children.pop(engine, None)

    def _child(self, engine: str) -> Child:
        """Return the process of *engine*, with the model loaded."""
        if engine not in self._children:
            child = Child(f"bench-engine-{engine}", "engine_child.py", engine)
            self._children[engine] = self._stack.enter_context(child)
            self._results.versions[engine] = self._load(child, SEQUENCES)["version"]
        return self._children[engine]

    def _load(self, child: Child, sequences: int) -> dict[str, Any]:
        return child.ask(
            "load",
            self._options.cell_seconds,
            path=str(self.path),
            threads=self.threads,
            sequences=sequences,
            context=ROOM_TOKENS,
        )

    @contextlib.contextmanager
    def _others_idle(self, engine: str) -> Iterator[None]:
        """Note where engines that wait for their turn compute all the same."""
        others = [child.process.pid for name, child in self._children.items() if name != engine]
        before, began = sum(map(cpu_seconds, others)), time.monotonic()
        yield
        share = (sum(map(cpu_seconds, others)) - before) / (time.monotonic() - began)
        if share > IDLE_SHARE:
            self._results.remarks.append(f"engines that waited computed {share:.0%} of a core")


def model_file(name: str) -> Path:
    """Return the file called *name*, or that of a model that is on this machine already."""
    if Path(name).is_file():
        return Path(name).resolve()
    try:
        path = find(NeuronConfig().places, name)
    except Unloadable as exc:
        raise Trouble(str(exc)) from exc
    if path is None:
        raise Trouble(f"{name} is not on this machine yet: load it once")
    return path


def requantised(path: Path, quant: str) -> Path:
    """Return *path* with its matrices in *quant*, in the cache; written where it is not there."""
    target = NeuronConfig().cache_directory / "bench" / f"{path.stem}-as-{quant}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        with Child("bench-engine-requantise", "engine_child.py", "llama.cpp") as child:
            child.ask("requantise", source=str(path), target=str(unfinished), quant=quant)
        unfinished.rename(target)
    return target


def own_seconds() -> float:
    """Return what this process and those of its children that have ended have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def show(bench: Bench, results: Results, took: float) -> None:
    """Print the table and the line of JSON; write it where it is wanted."""
    machine = f"{platform.machine()}, {cpu_name()}"
    date = time.strftime("%Y-%m-%d")
    print(f"{machine}, {date}; {bench.path.name}; {bench.threads} threads; {took:.0f} s")
    if results.bandwidths:
        read = Spread.of([each / 1e9 for each in results.bandwidths])
        print(f"memory read at {read.median:.1f} GB/s ({read.least:.1f} to {read.most:.1f})")
    for engine, version in results.versions.items():
        print(f"{engine}: {version}")
    print()
    for line in table(results, bench.peers):
        print(line)
    about = {"machine": machine, "date": date, "file": bench.path.name, "threads": bench.threads}
    text = json.dumps({**about, **plain(results, bench.peers)})
    print(text)
    if bench.json_file:
        bench.json_file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
