"""Loads models one after the other in a thread of its own, beside the steps of those already there.

    main thread                            loader thread
    start(LoadModel)       ── queue ──►    read the weights, measure a step, settle the limits,
    fd becomes readable    ◄─ eventfd ─    allocate the cache, book the memory
    take() -> outcomes     ◄─ queue ───    LoadProgress..., then Loaded, LoadFailed or DeviceLost

It beats for itself, once per tensor: a load may take minutes, but not in silence.

ZeroMQ sockets belong to one thread, so the events travel as objects and the main thread sends them.
The thread is a daemon: a load that is running when the process ends is not waited for.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
import torch

from cortex.ipc.descriptors import wake_up
from cortex.ipc.engine_options import DEFAULT_SEQUENCES, EngineOptions
from cortex.ipc.heartbeat import Activity
from cortex.ipc.messages import Failed, Footprint, LoadModel, LoadProgress, ModelLoaded
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.kernels.cuda_attention import Unavailable
from cortex.models.kernels.graphs import buckets
from cortex.runtime.device.async_runner import AsyncRunner
from cortex.runtime.device.cuda import open_device, reclaim, side_stream, wait_for_stream
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.faults import is_device_fault, is_out_of_memory
from cortex.runtime.device.grammar import Grammars
from cortex.runtime.device.memory import (
    DeviceMemory,
    Limits,
    Needs,
    mebibytes,
    settle,
)
from cortex.runtime.device.model_runner import (
    BLOCK_TOKENS,
    ModelRunner,
    ServableModel,
    kv_bytes_per_token,
)
from cortex.runtime.device.refusal import DeviceLost, Refused
from cortex.runtime.device.sampler import sampling_bytes
from cortex.runtime.device.scheduler import SCORED_ROWS
from cortex.runtime.device.vocabulary import Vocabulary
from cortex.runtime.device.workspace import Workspace, measure_workspace

PROGRESS_SECONDS = 0.1
CUDA_LIBRARY_BYTES = 256 * 2**20
"""Reserved for what CUDA takes after a load: workspaces of cuBLAS, graphs, kernel modules.
Reckoned, not measured yet."""
_log = structlog.get_logger()


class LoadFunction(Protocol):
    """``cortex.models.weights.load_model``."""

    def __call__(
        self,
        path: Path,
        *,
        device: torch.device,
        dtype: str,
        on_progress: Callable[[int, int], None],
    ) -> ServableModel:
        """Read the weights at *path*; raise CheckpointError, in words."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to step, and what to tell the supervisor."""

    engine: Engine
    event: ModelLoaded


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model that will not be there, and what to tell the supervisor."""

    model: str
    event: Failed


Outcome = LoadProgress | Loaded | LoadFailed | DeviceLost


class Loader:
    """The loader thread, seen from the main thread; ``fd`` is readable when outcomes wait."""

    def __init__(
        self,
        load_model: LoadFunction,
        device: torch.device,
        memory: DeviceMemory,
        *,
        token_budget: int,
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        beat: Callable[[Activity], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load_model = load_model
        self._device = device
        self._memory = memory
        self._token_budget = token_budget
        self._options = options
        self._beat = beat
        self._clock = clock
        self._commands: queue.SimpleQueue[LoadModel | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._wake_up = wake_up()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    @property
    def fd(self) -> int:
        """Readable when ``take`` has something to give."""
        return self._wake_up.fd

    def start(self, command: LoadModel) -> None:
        """Queue a load."""
        if not self._thread.is_alive():
            self._thread.start()
        self._commands.put(command)

    def take(self) -> list[Outcome]:
        """Return what has happened since the last call, in order."""
        try:
            count = os.eventfd_read(self._wake_up.fd)
        except BlockingIOError:
            return []
        return [self._outcomes.get_nowait() for _ in range(count)]

    def close(self) -> None:
        """Let the thread end after the load that it is in; does not wait for it."""
        if self._thread.is_alive():
            self._commands.put(None)
        else:
            self._wake_up.close()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            self._beat(Activity.LOADING)
            self._outcomes.put(self._outcome(command))
            self._beat(Activity.IDLE)
            # Nothing here refers to the model any more: an unload right away frees all of it.
            self._wake()
        self._wake_up.close()

    def _report(self, progress: LoadProgress) -> None:
        self._outcomes.put(progress)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_up.fd, 1)

    def _outcome(self, command: LoadModel) -> Outcome:
        """Load, and return whatever came of it; a failed load's memory is given back by then."""
        try:
            open_device(self._device)
            outcome = self._attempt(command)
            if isinstance(outcome, LoadFailed):
                reclaim(self._device)
        except DeviceLost as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - the thread must outlive it, and the main one know
            return DeviceLost(f"while loading {command.model}: {exc}")
        return outcome

    def _attempt(self, command: LoadModel) -> Outcome:
        try:
            with side_stream(self._device):
                return self._load(command)
        except Exception as exc:  # noqa: BLE001 - whatever it was, the steps of the others go on
            return _failure(command, exc)

    def _load(self, command: LoadModel) -> Loaded:
        began = self._clock()
        progress = _Progress(command, self._clock, self._memory, self._report)

        def on_progress(bytes_done: int, bytes_total: int) -> None:
            self._beat(Activity.LOADING)
            progress.tell(bytes_done, bytes_total)

        model = self._load_model(
            Path(command.path),
            device=self._device,
            dtype=command.dtype,
            on_progress=on_progress,
        )
        self._beat(Activity.LOADING)
        workspace = self._workspace(command, model)
        reclaim(self._device)  # what measuring left with torch's allocator counts as taken
        self._beat(Activity.LOADING)
        needs = _needs(model, workspace)
        limits = settle(command, needs, self._memory.free_bytes(model.weights_bytes))
        cache = model.new_cache(limits.blocks, BLOCK_TOKENS)
        kind = AsyncRunner if self._device.type == "cuda" else ModelRunner
        runner = kind(model, cache, self._device, max_sequences=limits.max_sequences)
        wait_for_stream(self._device)
        if runner.buffer_bytes:
            reclaim(self._device)  # what warming up left there
        beyond = max(0, runner.buffer_bytes - workspace.graph_bytes)
        footprint = Footprint(model.weights_bytes, cache.bytes, limits.workspace_bytes + beyond)
        self._memory.hold(command.model, footprint)
        return Loaded(
            Engine(
                command.model,
                runner,
                limits,
                token_budget=self._token_budget,
                device_type=self._device.type,
                options=self._options,
                grammars=Grammars(
                    partial(Vocabulary.from_checkpoint, Path(command.path)), model.vocab_size
                ),
            ),
            _model_loaded(command, limits, footprint, self._clock() - began),
        )

    def _workspace(self, command: LoadModel, model: ServableModel) -> Workspace:
        sequences = command.max_sequences or DEFAULT_SEQUENCES
        beside_bytes = sampling_bytes(sequences + SCORED_ROWS, model.vocab_size)
        has_graphs = self._device.type == "cuda" and self._options.cuda_graphs
        if self._device.type == "cuda":
            beside_bytes += kv_bytes_per_token(model) * BLOCK_TOKENS  # the scratch block
            beside_bytes += CUDA_LIBRARY_BYTES
        return measure_workspace(
            model,
            self._device,
            max(self._token_budget, sequences),
            beside_bytes,
            graph_rows=buckets(sequences) if has_graphs else (),
        )


class _Progress:
    """Passes a load's progress on, at most ten times a second, and stops a hopeless one early."""

    def __init__(
        self,
        command: LoadModel,
        clock: Callable[[], float],
        memory: DeviceMemory,
        report: Callable[[LoadProgress], None],
    ) -> None:
        self._command = command
        self._clock = clock
        self._memory = memory
        self._report = report
        self._next_at: float | None = None

    def tell(self, bytes_done: int, bytes_total: int) -> None:
        """Raise Refused where the weights alone are more than what is free."""
        now = self._clock()
        if self._next_at is None:
            self._refuse_too_large(bytes_total)
        elif now < self._next_at:
            return
        self._next_at = now + PROGRESS_SECONDS
        self._report(
            LoadProgress(self._command.command_id, self._command.model, bytes_done, bytes_total)
        )

    def _refuse_too_large(self, weights_bytes: int) -> None:
        free_bytes = self._memory.free_bytes()
        if weights_bytes > free_bytes:
            raise Refused(
                "insufficient_memory",
                f"the weights take {mebibytes(weights_bytes)}, "
                f"the device has {mebibytes(free_bytes)} free",
                weights_bytes=weights_bytes,
                memory_bytes=free_bytes,
            )


def _needs(model: ServableModel, workspace: Workspace) -> Needs:
    return Needs(
        max_position_embeddings=model.max_position_embeddings,
        kv_bytes_per_token=kv_bytes_per_token(model),
        block_tokens=BLOCK_TOKENS,
        workspace=workspace,
        weights_bytes=model.weights_bytes,
    )


def _model_loaded(
    command: LoadModel, limits: Limits, footprint: Footprint, load_seconds: float
) -> ModelLoaded:
    return ModelLoaded(
        command_id=command.command_id,
        model=command.model,
        footprint=footprint,
        max_context_tokens=limits.max_context_tokens,
        max_sequences=limits.max_sequences,
        kv_cache_tokens=limits.blocks * BLOCK_TOKENS,
        load_seconds=load_seconds,
    )


def _failure(command: LoadModel, error: Exception) -> LoadFailed | DeviceLost:
    if is_device_fault(error):
        return DeviceLost(f"while loading {command.model}: {error}")
    code, detail = "load_failed", f"loading {command.model} failed: {type(error).__name__}"
    numbers = {}
    if isinstance(error, Refused):
        code, detail, numbers = error.code, str(error), error.numbers
    elif isinstance(error, Unavailable):
        code, detail = "attention_unavailable", str(error)
    elif isinstance(error, CheckpointError):
        code, detail = "bad_checkpoint", str(error)
    elif isinstance(error, OSError):
        detail = f"loading {command.model} failed: {error}"
    elif is_out_of_memory(error):
        code, detail = "insufficient_memory", f"the device ran out of memory: {error}"
    else:
        _log.error("load failed", model=command.model, exc_info=error)
    failed = Failed(code, detail, command.command_id, numbers=numbers)
    return LoadFailed(command.model, failed)
