"""Time steps of large models on a GPU, with random weights: a table, and JSON.

A decode step cannot be faster than reading its weights, of experts those that are chosen, and its
keys and values once, and reading and writing its recurrent states: "share" is that time, by the
bandwidth of a device copy measured in the same rounds, of the time it took. Each row is timed in
interleaved rounds, ours and then transformers' with a static cache, on the same weights; "ratio" is
transformers' time by ours, round by round: minimum, median, maximum. Decoding includes choosing the
likeliest token; ours also brings every token to the host, as a server must. Beside transformers are
dense models of 16 bits without recurrent layers.

What does not fit into the device's memory, or into the time given, is left out, and said so.
Nothing is read from disk or network. Without a GPU, --device cpu --shapes tiny shows that the
program works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_peer import Peer
from random_models import SCALES, SHAPES, random_model, read_bytes, state_bytes

from cortex.ipc.messages import SamplingParams
from cortex.models.execution import Execution
from cortex.models.kernels.cuda_attention import Unavailable
from cortex.models.loaded_model import LoadedModel
from cortex.runtime.device.async_runner import AsyncRunner
from cortex.runtime.device.cuda import reclaim
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner, kv_bytes_per_token
from cortex.runtime.device.row import Row
from cortex.runtime.device.scheduler import TOKEN_BUDGETS
from cortex.runtime.device.sequence import UNKNOWN
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan

GIB = 2**30
COPY_BYTES = {"cuda": GIB, "cpu": 2**26}
SLACK_BYTES = 4 * GIB
"""Of a GPU, for what steps take beside weights and cache."""
WEIGHTS = ("bf16", *(kind.lower() for kind in SCALES), "fp8")
STEPS = 32
"""Decode steps of one timing."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=1, seed=0)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is timed: a token each of *sequences* at *context*, or a whole prompt of *context*."""

    sequences: int
    context: int
    is_prefill: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.is_prefill:
            return f"prompt of {self.context:,}"
        return f"{self.sequences} at context {self.context:,}"

    @property
    def tokens(self) -> int:
        """Tokens of one step, or of the prompt."""
        return self.context if self.is_prefill else self.sequences

    @property
    def blocks(self) -> int:
        """Blocks of the cache that it takes."""
        return self.sequences * -(-self.context // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Round:
    """One interleaved round of a cell: seconds of a step, and bytes copied per second."""

    ours: float
    theirs: float | None
    bandwidth: float


def main() -> None:
    """Print the table, then one line of JSON."""
    asked = _arguments()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "bench-gpu: torch sees no CUDA device here; "
            "--device cpu --shapes tiny shows that the program works"
        )
    deadline = time.monotonic() + 60 * asked.minutes
    cells = [Cell(1, tokens, is_prefill=True) for tokens in asked.prompts]
    cells += [Cell(batch, context) for context in asked.contexts for batch in asked.batches]
    print(f"{_device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"{'step':<30}{'ms':>9}{'tokens/s':>11}{'share':>8}{'transformers':>14}{'ratio':>21}")
    results: dict[str, dict[str, Any]] = {}
    for name in asked.shapes:
        print(f"\n{name}")
        results[name] = {}
        try:
            for cell, found in _measured(asked, SHAPES[name], device, cells, deadline):
                results[name][cell.name] = found
                print(_line(cell, found), flush=True)
        except Unavailable as exc:
            sys.exit(f"bench-gpu: {exc}")
    print("\n" + json.dumps(results))


def _arguments() -> argparse.Namespace:
    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",") if part]

    def shape(name: str) -> str:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SHAPES)}")
        return name

    parser = argparse.ArgumentParser(
        prog="scripts/bench-gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/bench-gpu --shapes 8b --batches 1,32 --contexts 2048 --minutes 5",
    )
    add = parser.add_argument
    add("--device", default="cuda:0", help="cuda:N, or cpu (default cuda:0)")
    add("--shapes", type=several(shape), default=["0.6b", "8b", "27b"], help=", ".join(SHAPES))
    add("--weights", choices=WEIGHTS, default="bf16", help="type of stored weights (default bf16)")
    add("--batches", type=several(int), default=[1, 8, 32], help="sequences (default 1,8,32)")
    add("--contexts", type=several(int), default=[128, 2048, 8192], help="(default 128,2048,8192)")
    add("--prompts", type=several(int), default=[512, 2048], help="tokens (default 512,2048)")
    add("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    add("--minutes", type=float, default=20.0, help="begin nothing new after so long (default 20)")
    add("--peer", choices=["none", "eager", "compile"], default="compile", help="transformers")
    add("--attention", default="auto", help="auto, flash_attn, torch, triton or reference")
    add("--eager", action="store_true", help="ours without CUDA graphs")
    add("--batch-invariant", action="store_true", help="ours with batch_invariant")
    return parser.parse_args()


def _measured(
    asked: argparse.Namespace,
    shape: Mapping[str, Any],
    device: torch.device,
    cells: Sequence[Cell],
    deadline: float,
) -> Any:
    """Yield each cell with what was found, or in words why nothing was."""
    reclaim(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    execution = Execution(
        asked.attention, is_batch_invariant=asked.batch_invariant, has_graphs=not asked.eager
    )
    try:
        stored = None if asked.weights == "bf16" else asked.weights.upper()
        model = random_model(shape, device, dtype, execution, stored)
    except torch.OutOfMemoryError:
        yield from ((cell, {"left out": "the weights do not fit"}) for cell in cells)
        return
    peer_mode = asked.peer
    if peer_mode != "none" and (stored or shape["model_type"] != "qwen3"):
        print("transformers is left out: not a dense model of 16 bits", file=sys.stderr)
        peer_mode = "none"
    caches = 1 if peer_mode == "none" else 2
    room = _free_bytes(device) // caches // (kv_bytes_per_token(model) * BLOCK_TOKENS)
    fitting = [cell for cell in cells if cell.blocks <= room]
    ours = Ours(model, fitting)
    peer = None if peer_mode == "none" else Peer(model, shape, is_compiled=peer_mode == "compile")
    for cell in cells:
        if cell not in fitting:
            yield cell, {"left out": "its keys and values do not fit"}
        elif time.monotonic() > deadline:
            yield cell, {"left out": "out of time"}
        else:
            try:
                rounds = _rounds(ours, peer, cell, asked.rounds)
            except torch.OutOfMemoryError:
                yield cell, {"left out": "out of memory"}
                continue
            least = read_bytes(model, shape, cell.tokens) + cell.sequences * state_bytes(model)
            yield cell, summary(cell, rounds, least, kv_bytes_per_token(model))


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return GIB
    return max(0, torch.cuda.mem_get_info(device)[0] - SLACK_BYTES)


def _rounds(ours: Ours, peer: Peer | None, cell: Cell, count: int) -> list[Round]:
    """Time *cell*, warm, so often."""
    device = ours.model.device
    theirs = None if peer is None else _theirs(peer, cell)
    ours.seconds(cell)
    return [
        Round(
            ours=ours.seconds(cell),
            theirs=theirs() if theirs else None,
            bandwidth=copy_bandwidth(device),
        )
        for _ in range(count)
    ]


def _theirs(peer: Peer, cell: Cell) -> Callable[[], float] | None:
    """Return what times transformers; None, in words, where it cannot: ours is still timed."""
    try:
        return peer.timed(cell.sequences, cell.context, STEPS, is_prefill=cell.is_prefill)
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # noqa: BLE001 - its compiler's errors are many
        print(f"transformers, {cell.name}: {type(exc).__name__}: {exc}", file=sys.stderr)
        return None


class Ours:
    """Our steps, as the engine launches them."""

    def __init__(self, model: LoadedModel, cells: Sequence[Cell]) -> None:
        self.model = model
        kind = AsyncRunner if model.device.type == "cuda" else ModelRunner
        sequences = max((cell.sequences for cell in cells), default=1)
        blocks = max((cell.blocks for cell in cells), default=1)
        self._cache = model.new_cache(blocks, BLOCK_TOKENS, sequences)
        self._runner = kind(model, self._cache, model.device, max_sequences=sequences)

    def seconds(self, cell: Cell) -> float:
        """Return the seconds of one step of *cell*, or of its whole prompt."""
        synchronize(self.model.device)
        began = time.perf_counter()
        if cell.is_prefill:
            self._prefill(cell)
            return time.perf_counter() - began
        self._decode(cell)
        return (time.perf_counter() - began) / STEPS

    def _prefill(self, cell: Cell) -> None:
        """Compute a prompt in the chunks that the scheduler would make."""
        budget = TOKEN_BUDGETS[self.model.device.type]
        launched = None
        for first in range(0, cell.context, budget):
            end = min(first + budget, cell.context)
            plan = _plan(cell, first, [1] * (end - first), is_last=end == cell.context)
            launched = self._runner.launch(plan, _rows(plan))
        assert launched is not None, "a prompt has tokens"
        launched.result()

    def _decode(self, cell: Cell) -> None:
        """Launch each step while the one before runs, as far as the runner can."""
        before = None
        for _ in range(STEPS):
            token = UNKNOWN if before and self._runner.runs_ahead else 1
            plan = _plan(cell, cell.context - 1, [token])
            launched = self._runner.launch(plan, _rows(plan))
            if before:
                before.result()
            before = launched
        assert before is not None, "there are steps"
        before.result()


def _plan(cell: Cell, first: int, token_ids: list[int], *, is_last: bool = True) -> StepPlan:
    each = cell.blocks // cell.sequences
    return StepPlan(
        [
            PlannedSequence(
                sequence_id=index,
                token_ids=token_ids,
                first_position=first,
                block_table=list(range(index * each, (index + 1) * each)),
                is_last=is_last,
                sampling=GREEDY,
                state_slot=index,
            )
            for index in range(cell.sequences)
        ]
    )


def _rows(plan: StepPlan) -> list[Row]:
    return [Row(GREEDY, planned.known_position) for planned in plan.sampled]


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy within *device*."""
    size = COPY_BYTES[device.type]
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(8):
        target.copy_(source)
    synchronize(device)
    return 8 * 2 * size / (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    """Wait for all that *device* was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(
    cell: Cell, rounds: Sequence[Round], weights_bytes: int, kv_bytes: int
) -> dict[str, float]:
    """Return what the table shows; *weights_bytes* a step moves, *kv_bytes* for each position."""
    seconds = statistics.median(each.ours for each in rounds)
    bandwidth = statistics.median(each.bandwidth for each in rounds)
    found = {
        "ms": seconds * 1e3,
        "tokens/s": cell.tokens / seconds,
        "bandwidth": bandwidth,
    }
    if not cell.is_prefill:
        least_bytes = weights_bytes + cell.sequences * cell.context * kv_bytes
        found["share"] = least_bytes / bandwidth / seconds
    ratios = sorted(each.theirs / each.ours for each in rounds if each.theirs is not None)
    if ratios:
        found["transformers ms"] = 1e3 * statistics.median(r.theirs for r in rounds if r.theirs)
        found["least ratio"], found["ratio"] = ratios[0], statistics.median(ratios)
        found["largest ratio"] = ratios[-1]
    return found


def _line(cell: Cell, found: Mapping[str, Any]) -> str:
    if "left out" in found:
        return f"{cell.name:<30}  left out: {found['left out']}"
    share = f"{found['share']:.0%}" if "share" in found else ""
    line = f"{cell.name:<30}{found['ms']:>9.2f}{found['tokens/s']:>11,.0f}{share:>8}"
    if "ratio" not in found:
        return line
    three = [found[name] for name in ("least ratio", "ratio", "largest ratio")]
    return line + f"{found['transformers ms']:>14.2f}" + "".join(f"{each:>7.2f}" for each in three)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
