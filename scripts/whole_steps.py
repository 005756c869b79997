"""Whole steps of the engine, for bench-step: how long the model's forward takes, and all beside it.

Beside the forward are the schedule, the batch, the choice of the tokens and the report.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Generate, SamplingParams
from cortex.models.batch import Batch, KVCache
from cortex.models.loaded_model import LoadedModel
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner, ServableModel
from cortex.runtime.device.scheduler import TOKEN_BUDGETS

PHRASE_TOKENS = 12
REPEATED = 4  # a model that goes on with it is as sure of its tokens as one that writes
WARM_STEPS = 16
STEPS = 24
CONTEXT_TOKENS = 128  # room for all of these
MOST = 32
BATCHES = 1, 8, MOST
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
}
WITHOUT_DRAFTS = EngineOptions(speculation=False)  # of each sequence one token a step


class TimedModel:
    """A model that notes how long its forwards take."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def recorded(self, cache: KVCache, max_sequences: int) -> Callable[[Batch], Tensor]:
        """Return the model's step with a clock."""
        step = self._model.recorded(cache, max_sequences)

        def timed(batch: Batch) -> Tensor:
            began = time.perf_counter()
            logits = step(batch)
            self.seconds += time.perf_counter() - began
            return logits

        return timed


def measure_whole_steps(model: LoadedModel, rounds: int) -> dict[str, dict[str, float]]:
    """Return medians of milliseconds in the forward and beside it, by batch and way of choosing."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    timed = TimedModel(model)
    blocks = MOST * CONTEXT_TOKENS // BLOCK_TOKENS
    cache = model.new_cache(blocks, BLOCK_TOKENS)
    for _ in range(rounds):
        for batch in BATCHES:
            for way, options in WAYS.items():
                engine = _engine(timed, cache, blocks)
                _start(engine, batch, options, model.vocab_size)
                seconds.setdefault(f"{batch}, {way}", []).extend(_steps(engine, timed))
    rows = {}
    for name, pairs in seconds.items():
        forward, beside = (statistics.median(part) for part in zip(*pairs, strict=True))
        rows[name] = {
            "forward_ms": forward * 1e3,
            "beside_ms": beside * 1e3,
            "share": beside / (forward + beside),
        }
    return rows


def _engine(timed: TimedModel, cache: KVCache, blocks: int) -> Engine:
    runner = ModelRunner(cast(ServableModel, timed), cache, torch.device("cpu"), max_sequences=MOST)
    limits = Limits(CONTEXT_TOKENS, MOST, blocks, workspace_bytes=0)
    budget = TOKEN_BUDGETS["cpu"]
    return Engine("timed", runner, limits, token_budget=budget, options=WITHOUT_DRAFTS)


def _start(engine: Engine, batch: int, options: dict[str, Any], vocab_size: int) -> None:
    """Start so many sequences, and run until all of them do nothing but decode."""
    for number in range(batch):
        seed = torch.Generator().manual_seed(number)
        prompt = torch.randint(0, vocab_size, (PHRASE_TOKENS,), generator=seed).tolist() * REPEATED
        sampling = SamplingParams(max_tokens=CONTEXT_TOKENS, seed=number, **options)
        engine.start(Generate(number, number, "timed", prompt, sampling))
    while engine.step().tokens != batch:
        pass
    for _ in range(WARM_STEPS):
        engine.step()


def _steps(engine: Engine, timed: TimedModel) -> list[tuple[float, float]]:
    """Return how many seconds of each step were in the forward, and beside it."""
    pairs = []
    for _ in range(STEPS):
        timed.seconds = 0.0
        began = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - began
        pairs.append((timed.seconds, whole - timed.seconds))
    return pairs
