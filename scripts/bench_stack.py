"""Measure a whole stack, started afresh, through its public address: a table, and JSON.

A decode step reads every weight once per step, so the share of the memory bandwidth that is
measured in the same run, interleaved with the rounds, says how near the limit a single stream is.
Absolute numbers drift from hour to hour on a shared machine; the shares of one run do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from answers import MODEL, Address, answered, events
from processes import family, name_of, proportional_bytes
from quickstart import Stack, free_addresses

TOKENS = 128
STREAMS = 8
LONG_PROMPT = "The sea is wide and the sky is high. " * 50
READ_BYTES = 2**28


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/bench-stack", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    rounds = parser.parse_args().rounds
    anywhere = Address("127.0.0.1", 0)
    names = ("--listen", "--neuron-listen", "--metrics-listen")
    start = time.monotonic()
    with Stack(free_addresses(dict.fromkeys(names, anywhere))) as stack:
        result = measure(stack, start, rounds)
    for name, value in result.items():
        print(f"{name:<48}{value if isinstance(value, str) else f'{value:,.2f}':>14}")
    print(json.dumps(result))


def measure(stack: Stack, start: float, rounds: int) -> dict[str, Any]:
    """Return every figure; medians over *rounds*."""
    stack.wait_until_serving()
    serving = time.monotonic() - start
    stream(stack, "Hi.", 1)
    cold = time.monotonic() - start
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, value in one_round(stack):
            figures.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    weights = stack.loading()["devices"][0]["weights_mb"] * 2**20
    share = medians["one stream, tokens/s"] * weights / medians["memory bandwidth read, GB/s"] / 1e9
    return {
        "machine": f"{platform.machine()}, {cpu_name()}",
        "date": time.strftime("%Y-%m-%d"),
        "start to serving, s": serving,
        "start to first token, s": cold,
        **medians,
        "one stream, share of the bandwidth": share,
        **memory(stack.process.pid),
    }


def one_round(stack: Stack) -> Iterator[tuple[str, float]]:
    """Yield the figures of one interleaved round."""
    yield "memory bandwidth read, GB/s", read_bandwidth() / 1e9
    first, rate, _ = stream(stack, "Tell a story.", TOKENS)
    yield "first token, short prompt, s", first
    yield "one stream, tokens/s", rate
    unheard = f"{secrets.token_hex(4)}: {LONG_PROMPT}"  # which no prefix cache has
    first, _, prompt_tokens = stream(stack, unheard, 2)
    yield "first token, long prompt, s", first
    yield "long prompt, tokens", prompt_tokens
    yield f"{STREAMS} streams together, tokens/s", together(stack)


def stream(stack: Stack, prompt: str, tokens: int) -> tuple[float, float, int]:
    """Return seconds to the first token, tokens per second after it, and tokens of the prompt."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.monotonic()
    first = 0.0
    usage: dict[str, int] = {}
    with answered(stack.gateway, "/v1/chat/completions", body) as response:
        for event in events(response):
            usage = event.get("usage") or usage
            has_text = any(choice["delta"].get("content") for choice in event["choices"])
            first = first or (time.monotonic() - start if has_text else 0.0)
    rest = time.monotonic() - start - first
    return first, (usage["completion_tokens"] - 1) / rest, usage["prompt_tokens"]


def together(stack: Stack) -> float:
    """Return tokens per second of STREAMS streams that start at once."""
    start = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda n: stream(stack, f"Tell story {n}.", TOKENS), range(STREAMS)))
    return STREAMS * TOKENS / (time.monotonic() - start)


def read_bandwidth() -> float:
    """Return bytes per second of summing an array on two threads, best of five."""
    halves = np.ones((2, READ_BYTES // 16), dtype=np.float64)
    best = float("inf")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            start = time.monotonic()
            list(pool.map(np.sum, halves))
            best = min(best, time.monotonic() - start)
    return halves.nbytes / best


def memory(pid: int) -> dict[str, float]:
    """Return the proportional set size, in MiB, of each process of the stack."""
    return {
        f"memory of {name_of(child)}, MiB": proportional_bytes(child) / 2**20
        for child in sorted(family(pid))
    }


def cpu_name() -> str:
    """Return the processor's name and how many of it we have."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
