"""Time the steps of a model on this CPU, without HTTP: tables, and JSON.

Every round times each kind of step once, without sampling, beside a read of the memory bandwidth,
so that the share of the bandwidth is of one run; a step of one sequence has to read every weight.
Then it says where the time of a step goes, and of whole steps of the engine, how much of it is
beside the model: schedule, batch, choice of the tokens, report. The model has to be on this machine
already: the quick start fetches the embedded one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_stack import cpu_name, read_bandwidth
from whole_steps import measure_whole_steps

from cortex.ipc.errors import Unloadable
from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import EMBEDDED_MODEL
from cortex.models.kernels.program import Program
from cortex.models.loaded_model import LoadedModel
from cortex.models.weights import load_model
from cortex.runtime.config import NeuronConfig
from cortex.runtime.device.model_runner import BLOCK_TOKENS, make_batch
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.model_files import find

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Kind:
    """Steps of *sequences*, each with *tokens* new ones at the end of *context*."""

    sequences: int
    context: int
    tokens: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of one sequence."""
        return -(-self.context // BLOCK_TOKENS)

    def plan(self) -> StepPlan:
        """Return such a step."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
        return StepPlan(
            [
                PlannedSequence(
                    sequence_id=index,
                    token_ids=[1 + index] * self.tokens,
                    first_position=self.context - self.tokens,
                    block_table=list(range(index * self.blocks, (index + 1) * self.blocks)),
                    is_last=True,
                    sampling=sampling,
                )
                for index in range(self.sequences)
            ]
        )


KINDS = {
    "1 at context 64": Kind(1, 64),
    "8 at context 64": Kind(8, 64),
    "32 at context 64": Kind(32, 64),
    "1 at context 2,048": Kind(1, 2048),
    "8 at context 2,048": Kind(8, 2048),
    "prompt, 128 up to position 512": Kind(1, 512, 128),
}
READS_ONCE = [kind for kind in KINDS.values() if kind.sequences == kind.tokens == 1]
"""Whose time is at least that of reading the weights."""


def main() -> None:
    """Print the tables, then one line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/bench-step", description=__doc__)
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED_MODEL, help="as in a load (default: the embedded one)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds (default 10)")
    parser.add_argument("--dtype", default="auto", help="as in a load (default auto)")
    asked = parser.parse_args()
    model = load_model(
        files_of(asked.model),
        device=CPU,
        dtype=asked.dtype,
        on_progress=lambda _done, _all: None,
    )
    blocks = max(kind.sequences * kind.blocks for kind in KINDS.values())
    step = model.recorded(model.new_cache(blocks, BLOCK_TOKENS))
    if not isinstance(step, Program):
        sys.exit("bench-step: there are no kernels here, or not in this dtype")
    result = measure(model, step, asked.rounds)
    print(f"{platform.machine()}, {cpu_name()}, {time.strftime('%Y-%m-%d')}")
    print(f"{'step':<34}{'ms':>9}{'least':>9}{'tokens/s':>11}{'bandwidth':>11}")
    for name, row in result.items():
        share = f"{row['share']:.0%}" if KINDS[name] in READS_ONCE else ""
        print(
            f"{name:<34}{row['ms']:>9.2f}{row['least_ms']:>9.2f}{row['tokens/s']:>11,.0f}{share:>11}"
        )
    for name in ("1 at context 64", "32 at context 64"):
        parts = ", ".join(f"{part} {us:,.0f}" for part, us in profile(step, KINDS[name]).items())
        print(f"\n{name}, us: {parts}")
    whole = measure_whole_steps(model, max(1, asked.rounds // 3))
    print(f"\n{'whole step of the engine':<34}{'forward':>9}{'beside':>9}{'share':>9}")
    for name, row in whole.items():
        print(f"{name:<34}{row['forward_ms']:>9.2f}{row['beside_ms']:>9.2f}{row['share']:>9.1%}")
    print(json.dumps({"steps": result, "whole_steps": whole}))


def files_of(model_id: str) -> Path:
    """Return where a model's files are, or end in words."""
    try:
        path = find(NeuronConfig().places, model_id)
    except Unloadable as exc:
        sys.exit(f"bench-step: {exc}")
    if path is None:
        sys.exit(f"bench-step: {model_id} is not on this machine yet: load it once")
    return path


@torch.inference_mode()
def measure(model: LoadedModel, step: Program, rounds: int) -> dict[str, dict[str, float]]:
    """Return median and least milliseconds of each kind of step, and what follows from them."""
    cache = step.cache
    for written in (*cache.keys, *cache.values):
        written.normal_()  # memory never written is one page of zeros, which is always in cache
    batches = {name: make_batch(kind.plan(), cache, CPU) for name, kind in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    bandwidths = []
    for batch in batches.values():
        step(batch)  # recorded now
    for _ in range(rounds):
        bandwidths.append(read_bandwidth())
        for name, batch in batches.items():
            began = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - began)
    bandwidth = statistics.median(bandwidths)
    rows = {}
    for name, kind in KINDS.items():
        median = statistics.median(seconds[name])
        rows[name] = {
            "ms": median * 1e3,
            "least_ms": min(seconds[name]) * 1e3,
            "tokens/s": kind.sequences * kind.tokens / median,
            "share": model.weights_bytes / median / bandwidth,
        }
    return rows


@torch.inference_mode()
def profile(step: Program, kind: Kind, steps: int = 10) -> Mapping[str, float]:
    """Return microseconds per step and operation, largest first."""
    batch = make_batch(kind.plan(), step.cache, CPU)
    step.profile()
    for _ in range(steps):
        step(batch)
    spent = {name: seconds / steps * 1e6 for name, seconds in step.profile().items() if seconds}
    return dict(sorted(spent.items(), key=lambda part: -part[1]))


if __name__ == "__main__":
    main()
