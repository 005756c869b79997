"""Measure what HTTP costs: streams through a neuron against its engine called directly.

Both are a supervisor, a fork server and a device process; one answers /v1/chat/completions, the
other only counts the tokens that come out of the ring (``direct_engine.py``). They get the same
prompts in turns, and the idle one waits for its turn without computing. The client of the streams
is this process, which searches the bytes for the end and looks at nothing else. Beside the ratio
stand the processor seconds of everybody who took part: on a machine whose cores all compute, what
the supervisor and the client take is what the device process lacks.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import selectors
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from answers import MODEL, Address, Trouble
from bench_stack import cpu_name
from children import Child
from local_neuron import LocalNeuron
from processes import cpu_seconds_by_name

CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]"
PATIENCE_SECONDS = 120.0
READ_BYTES = 2**18
OWN = "the client"


@dataclass(frozen=True)
class Turn:
    """What one round through one way took."""

    seconds: float
    tokens: int
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def main() -> int:
    """Print the table, then one line of JSON; return the exit status."""
    options = arguments()
    try:
        with ExitStack() as stack:
            neuron = stack.enter_context(LocalNeuron("bench-http", [MODEL]))
            direct = stack.enter_context(Child("bench-http-direct", "direct_engine.py"))
            neuron.wait_until_loaded()
            rounds = measure(neuron, direct, options)
    except Trouble as exc:
        print(f"bench-http: {exc}", file=sys.stderr)
        return 1
    result = figures(rounds)
    print_table(result, options)
    print(json.dumps({"streams": options.streams, "tokens": options.tokens, **result}))
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-http", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--streams", type=int, default=16, help="at the same time (default 16)")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream (default 128)")
    return parser.parse_args()


def measure(
    neuron: LocalNeuron, direct: Child, options: argparse.Namespace
) -> list[tuple[Turn, Turn]]:
    """Return each round's turns, through HTTP and directly; who is first alternates.

    One round before them warms up.
    """
    rounds = []
    for number in range(options.rounds + 1):
        conversations = [
            [{"role": "user", "content": f"Tell me story {number}.{stream}, a long one."}]
            for stream in range(options.streams)
        ]
        through = through_http(neuron, conversations, options.tokens) if number % 2 else None
        prompts = [tokens_of(neuron, conversation) for conversation in conversations]
        directly = Turn(**direct.ask("generate", prompts=prompts, tokens=options.tokens))
        through = through or through_http(neuron, conversations, options.tokens)
        rounds.append((through, directly))
    return rounds[1:]


def tokens_of(neuron: LocalNeuron, conversation: list[dict[str, str]]) -> list[int]:
    """Return what the neuron makes of *conversation*."""
    asked = {"model": MODEL, "messages": conversation}
    tokens: list[int] = neuron.post("/tokenize", asked)["tokens"]
    return tokens


def through_http(
    neuron: LocalNeuron, conversations: Sequence[list[dict[str, str]]], tokens: int
) -> Turn:
    """Stream *tokens* of an answer to each of *conversations*, all at once."""
    bodies = [
        {
            "model": MODEL,
            "messages": conversation,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for conversation in conversations
    ]
    before = cpu_seconds_by_name(neuron.process.pid)
    own = time.process_time()
    seconds, answers = streamed(neuron.place, CHAT, bodies)
    own = time.process_time() - own
    after = cpu_seconds_by_name(neuron.process.pid)
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    return Turn(seconds, sum(map(completion_tokens, answers)), {**spent, OWN: own})


def streamed(
    place: Address, path: str, bodies: Sequence[dict[str, Any]]
) -> tuple[float, list[bytes]]:
    """Send all of *bodies*, read every answer to its [DONE]; return the seconds and the answers.

    Raise Trouble for an answer that ends without one, or in silence.
    """
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        began = time.perf_counter()
        for body in bodies:
            each = socket.create_connection((place.host, place.port))
            stack.enter_context(each)
            selector.register(each, selectors.EVENT_READ, _Stream(each))
            each.sendall(request(place, path, body))
        streams = [key.data for key in selector.get_map().values()]
        while selector.get_map():
            ready = selector.select(PATIENCE_SECONDS)
            if not ready:
                raise Trouble(f"{len(selector.get_map())} streams are silent")
            for key, _ in ready:
                if key.data.read():
                    selector.unregister(key.fileobj)
        return time.perf_counter() - began, [bytes(stream.answer) for stream in streams]


class _Stream:
    """One connection, and what has come through it."""

    def __init__(self, connection: socket.socket) -> None:
        self.answer = bytearray()
        self._connection = connection

    def read(self) -> bool:
        """Take what is there; return whether it ends with that."""
        piece = self._connection.recv(READ_BYTES)
        if not piece:
            raise Trouble(f"a stream ended early: {bytes(self.answer[-300:])!r}")
        self.answer += piece
        return self.answer.find(DONE, max(0, len(self.answer) - len(piece) - len(DONE))) >= 0


def request(place: Address, path: str, body: dict[str, Any]) -> bytes:
    """Return a POST of *body*, byte by byte."""
    encoded = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {place}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def completion_tokens(answer: bytes) -> int:
    """Return what the answer's usage counts; raise Trouble where it has none."""
    found = re.findall(rb'"completion_tokens":\s*(\d+)', answer)
    if not found:
        raise Trouble(f"an answer without usage: {answer[:300]!r}")
    return int(found[-1])


def figures(rounds: Sequence[tuple[Turn, Turn]]) -> dict[str, Any]:
    """Return rates, their ratio round by round, and processor seconds per 1,000 tokens."""
    ratios = [through.rate / direct.rate for through, direct in rounds]
    ways = {"HTTP": [through for through, _ in rounds], "direct": [direct for _, direct in rounds]}
    return {
        "machine": f"{platform.machine()}, {cpu_name()}",
        "date": time.strftime("%Y-%m-%d"),
        "tokens/s": {way: statistics.median(t.rate for t in turns) for way, turns in ways.items()},
        "ratio": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        },
        "CPU seconds per 1,000 tokens": {way: cpu(turns) for way, turns in ways.items()},
    }


def cpu(turns: Sequence[Turn]) -> dict[str, float]:
    """Return the medians of what each process took."""
    names = sorted({name for turn in turns for name in turn.cpu_seconds})
    return {
        name: statistics.median(t.cpu_seconds.get(name, 0.0) / t.tokens * 1e3 for t in turns)
        for name in names
    }


def print_table(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Show the figures."""
    print(f"{result['machine']}, {result['date']}")
    print(f"{options.streams} streams of {options.tokens} tokens, {options.rounds} rounds\n")
    for way, rate in result["tokens/s"].items():
        print(f"{way + ', tokens/s':<48}{rate:>10,.1f}")
    ratio = result["ratio"]
    print(
        f"{'HTTP / direct':<48}{ratio['median']:>10.1%}"
        f"   ({ratio['least']:.1%} to {ratio['most']:.1%})"
    )
    for way, spent in result["CPU seconds per 1,000 tokens"].items():
        for name, seconds in spent.items():
            if seconds >= 0.0005:
                print(f"{f'{way}: CPU s per 1,000 tokens, {name}':<48}{seconds:>10.3f}")


if __name__ == "__main__":
    sys.exit(main())
