"""Put Poisson load on an OpenAI endpoint and say how it fares: ours, or any other server's.

    scripts/bench-serve --rate 0.5,1,2 --duration 60                        starts a neuron of ours
    scripts/bench-serve --base-url http://localhost:8080 --model m --key K  llama-server, vLLM, ...

Requests are sent when they are due, however many are open (--concurrency bounds that, and the wait
for it counts). They are streams of /v1/chat/completions and use nothing but what OpenAI has;
--ignore-eos is an extension of some servers that makes every answer as long as it may get. Lengths
are N, A-B (even) or lognormal:MEDIAN:SIGMA. Prompts are words, as many as make about the tokens
that were asked for; --shared-prefix-tokens lets all begin alike, for a cache of prefixes to show.

    TTFT        from when a request was due to the first piece of its answer
    ITL         between the pieces of an answer, of all answers
    goodput     share of the requests, and tokens/s of those, that ended well within both limits:
                the first piece in --slo-ttft-ms, and on average a token in --slo-itl-ms

Exit status 1 where no request ended well. Ctrl-C shows what there is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from answers import MODEL, Trouble
from local_neuron import LocalNeuron
from serve_load import Endpoint, Lengths, PromptMaker, Seen, plan, run

QUANTILES = (50, 90, 99)


@dataclass
class Rate:
    """What was seen at one rate."""

    rate: float
    planned: int
    ended: list[Seen] = field(default_factory=list)
    seconds: float = 0.0
    """From the first that was due to the last that ended."""


def main() -> int:
    """Print the table, then one line of JSON; return the exit status."""
    options = arguments()
    rates: list[Rate] = []
    try:
        with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
            if options.base_url is None:
                neuron = stack.enter_context(LocalNeuron("bench-serve", [MODEL]))
                neuron.wait_until_loaded()
                options.base_url, options.model = f"http://{neuron.place}", MODEL
            asyncio.run(measure(options, rates))
    except Trouble as exc:
        print(f"bench-serve: {exc}", file=sys.stderr)
        return 1
    results = [figures(rate, options.slo_ttft_ms, options.slo_itl_ms) for rate in rates]
    print_table(results, options)
    text = json.dumps({"about": about(options), "rates": results})
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if any(result["ended well"] for result in results) else 1


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench-serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base-url", help="of the server, with or without /v1 (default: a neuron of ours)")
    add("--model", help="its name there (default: the first that the server lists)")
    add("--key", help="sent as a bearer token")
    add("--rate", type=numbers, default=[1.0], help="requests/s, or several: 0.5,1,2 (default 1)")
    add("--duration", type=float, default=30.0, help="seconds of each rate (default 30)")
    add("--input-tokens", type=Lengths.parse, default="64-256", help="(default 64-256)")
    add("--output-tokens", type=Lengths.parse, default="32-128", help="(default 32-128)")
    add("--shared-prefix-tokens", type=int, default=0, help="that all prompts begin with")
    add("--concurrency", type=int, help="requests open at a time (default: as many as come)")
    add("--seed", type=int, default=1, help="of what is drawn (default 1)")
    add("--ignore-eos", action="store_true", help="send ignore_eos, where the server knows it")
    add("--timeout", type=float, default=300.0, help="seconds for a whole request (default 300)")
    add("--slo-ttft-ms", type=float, default=1000.0, help="limit for goodput (default 1000)")
    add("--slo-itl-ms", type=float, default=100.0, help="limit for goodput (default 100)")
    add("--json", type=Path, metavar="FILE", help="write the JSON there, too")
    return parser.parse_args()


def numbers(text: str) -> list[float]:
    """Read numbers above 0; raise ValueError."""
    found = [float(part) for part in text.split(",")]
    if min(found) <= 0:
        raise ValueError(f"{text!r} has a rate that is not above 0")
    return found


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for, as JSON has it; without the key."""
    asked = {name: value for name, value in vars(options).items() if name not in {"key", "json"}}
    lengths = {name: asked[name].text for name in ("input_tokens", "output_tokens")}
    return {**asked, **lengths, "date": time.strftime("%Y-%m-%d")}


async def measure(options: argparse.Namespace, rates: list[Rate]) -> None:
    """Run every rate; *rates* has what was seen so far, also where this is cancelled."""
    headers = {"authorization": f"Bearer {options.key}"} if options.key else {}
    extras = {"ignore_eos": True} if options.ignore_eos else {}
    async with aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=options.timeout),
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        endpoint = Endpoint(session, options.base_url, options.model, extras)
        if options.model is None:
            options.model = await endpoint.first_model()
        known = await endpoint.calibrated(PromptMaker("calibration"))
        for rate in options.rate:
            maker = known.of(f"{options.seed} {rate}", options.shared_prefix_tokens)
            await one_rate(endpoint, rate, maker, options, rates)


async def one_rate(
    endpoint: Endpoint,
    rate: float,
    maker: PromptMaker,
    options: argparse.Namespace,
    rates: list[Rate],
) -> None:
    """Run one rate until its last request has ended."""
    inputs, outputs = options.input_tokens, options.output_tokens
    planned = plan(rate, options.duration, inputs, outputs, options.seed)
    rates.append(found := Rate(rate, len(planned)))
    began = time.perf_counter()
    print(f"{len(planned)} requests at {rate:g} a second", file=sys.stderr, flush=True)
    try:
        await run(endpoint, planned, maker, options.concurrency, found.ended)
    finally:
        found.seconds = time.perf_counter() - began


def figures(rate: Rate, slo_ttft_ms: float, slo_itl_ms: float) -> dict[str, Any]:
    """Return what the table shows of *rate*; times in milliseconds."""
    well = [seen for seen in rate.ended if seen.error is None]
    good = [
        seen
        for seen in well
        if seen.first * 1e3 <= slo_ttft_ms and seen.seconds_per_token * 1e3 <= slo_itl_ms
    ]
    seconds = max(rate.seconds, 1e-9)
    return {
        "rate": rate.rate,
        "planned": rate.planned,
        "ended": len(rate.ended),
        "ended well": len(well),
        "errors": dict(Counter(seen.error for seen in rate.ended if seen.error)),
        "TTFT": quantiles([seen.first for seen in well]),
        "ITL": quantiles([gap for seen in well for gap in seen.gaps]),
        "per token": quantiles([seen.seconds_per_token for seen in well]),
        "end to end": quantiles([seen.ended for seen in well]),
        "requests/s": len(well) / seconds,
        "tokens/s": sum(seen.output_tokens for seen in well) / seconds,
        "goodput": len(good) / len(rate.ended) if rate.ended else 0.0,
        "goodput, tokens/s": sum(seen.output_tokens for seen in good) / seconds,
        "prompt tokens": mean([seen.prompt_tokens for seen in well]),
        "cached tokens": mean([seen.cached_tokens for seen in well]),
        "output tokens": mean([seen.output_tokens for seen in well]),
        "tokens counted by": "usage" if all(seen.tokens is not None for seen in well) else "pieces",
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return the milliseconds that so many per cent of the values do not exceed."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    return {
        f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] * 1e3
        for share in QUANTILES
    }


def mean(values: Sequence[int | None]) -> float | None:
    """Return the mean of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def print_table(results: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Show the figures."""
    print(f"{options.model} at {options.base_url}, {time.strftime('%Y-%m-%d')}; milliseconds")
    times = "".join(f"{name + ' p50/p90/p99':>24}" for name in ("TTFT", "ITL", "end to end"))
    print(f"{'rate':>6}{'ended well':>14}{'tokens/s':>10}{times}{'goodput':>9}{'tokens/s':>10}")
    for result in results:
        counts = f"{result['ended well']} of {result['planned']}"
        shown = "".join(f"{_three(result[name]):>24}" for name in ("TTFT", "ITL", "end to end"))
        print(
            f"{result['rate']:>6g}{counts:>14}{result['tokens/s']:>10.1f}{shown}"
            f"{result['goodput']:>9.0%}{result['goodput, tokens/s']:>10.1f}"
        )
    for result in results:
        lengths = ", ".join(
            f"{result[name]:,.0f} {name}"
            for name in ("prompt tokens", "cached tokens", "output tokens")
            if result[name] is not None
        )
        print(f"at {result['rate']:g}: on average {lengths or 'nothing'}", end="")
        print("" if result["tokens counted by"] == "usage" else "; a piece counts as a token")
        for error, count in result["errors"].items():
            print(f"  {count} x {error}")


def _three(milliseconds: dict[str, float] | None) -> str:
    if milliseconds is None:
        return "-"
    return " / ".join(f"{value:,.0f}" for value in milliseconds.values())


if __name__ == "__main__":
    sys.exit(main())
