"""Our engine, as a device process runs it: its loader, its recorded steps, its sampler.

Without speculation: the tokens of a random prompt's answer repeat themselves, and a draft of them
would be right far too often.
"""

from __future__ import annotations

import gc
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from answers import Trouble
from engine_child import Timed, prompt

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Generate, LoadModel, LoadProgress, SamplingParams
from cortex.ipc.ring import Flag, TokenRecord
from cortex.models.weights import load_model
from cortex.runtime.device import engine as our
from cortex.runtime.device.cuda import share_one_heap
from cortex.runtime.device.loader import Loaded, Loader, LoadFailed
from cortex.runtime.device.memory import DeviceMemory
from cortex.runtime.device.scheduler import TOKEN_BUDGETS

MODEL = "measured"
CPU = torch.device("cpu")
ENDLESS = 1 << 20


class Engine:
    """One loaded model; an ``engine_child.MeasuredEngine``."""

    version = "cortex, without speculation"
    _engine: our.Engine

    def __init__(self) -> None:
        self._ids = 0

    def load(self, path: Path, threads: int, sequences: int, context: int) -> None:
        """Load in the loader's thread."""
        share_one_heap()
        gc.freeze()  # as the device process does with what its imports made
        torch.set_num_threads(threads)
        memory = DeviceMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        loader = Loader(
            load_model,
            CPU,
            memory,
            token_budget=TOKEN_BUDGETS["cpu"],
            options=EngineOptions(speculation=False),
        )
        loader.start(
            LoadModel(1, MODEL, str(path), max_context_tokens=context, max_sequences=sequences)
        )
        self._engine = loaded(loader).engine
        loader.close()

    def prefill(self, prompt: Sequence[int]) -> int:
        """Run a sequence of one token."""
        sequence_id = self._start(prompt, tokens=1)
        return self._first_tokens({sequence_id})[sequence_id]

    def decode(self, batch: int, context: int, steps: int) -> Timed:
        """Bring *batch* sequences to where all of them decode, then time steps.

        From the second time on the prefix cache has their prompts.
        """
        ids = {self._start(prompt(number, context), ENDLESS) for number in range(batch)}
        self._first_tokens(ids)
        tokens, began = 0, time.perf_counter()
        for _ in range(steps):
            tokens += len(answers(self._engine.step().records))
        seconds = time.perf_counter() - began
        for sequence_id in ids:
            self._engine.cancel(sequence_id)
        return Timed(seconds, tokens)

    def _start(self, prompt: Sequence[int], tokens: int) -> int:
        self._ids += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, seed=0)
        self._engine.start(Generate(self._ids, self._ids, MODEL, list(prompt), sampling))
        return self._ids

    def _first_tokens(self, ids: set[int]) -> dict[int, int]:
        """Step until every sequence has a token; return the last one of each."""
        seen: dict[int, int] = {}
        while not ids <= seen.keys():
            report = self._engine.step()
            if report.events:
                raise Trouble(f"a step failed: {report.events[0]}")
            seen |= {record.sequence_id: record.token_id for record in answers(report.records)}
        return seen


def loaded(loader: Loader) -> Loaded:
    """Wait for what the loader makes of its command; raise Trouble where that is nothing."""
    while True:
        select.select([loader.fd], [], [])
        for outcome in loader.take():
            match outcome:
                case Loaded():
                    return outcome
                case LoadFailed(event=failed):
                    raise Trouble(failed.detail)
                case LoadProgress():
                    continue
                case lost:
                    raise Trouble(str(lost))


def answers(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """Return those of *records* that are tokens of an answer."""
    return [record for record in records if record.flags & Flag.TOKEN]
