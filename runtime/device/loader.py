"""Loads models one after the other in a thread of its own, beside the steps of those already there.

    main thread                            loader thread
    start(LoadModel)       ── queue ──►    read the weights, measure a step, settle the limits,
    fd becomes readable    ◄─ eventfd ─    allocate the cache, book the memory
    take() -> outcomes     ◄─ queue ───    LoadProgress..., then Loaded, LoadFailed or DeviceLost

It beats for itself, once per tensor: a load may take minutes, but not in silence.

Of a model that is spread over a group every rank loads its part, and they go through it together
(``rendezvous.py``): what fails on one fails on all. The first rank's engine then tells its steps to
the others, whose outcome is a follower. ``groups.py`` has this thread wait for ranks in other ways.

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
from cortex.ipc.messages import (
    PEER_LOST,
    Failed,
    Footprint,
    LoadModel,
    LoadProgress,
    ModelLoaded,
)
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.kernels.cuda_attention import Unavailable
from cortex.models.kernels.graphs import buckets
from cortex.models.parallel import ALONE, Group
from cortex.runtime.device.async_runner import AsyncRunner
from cortex.runtime.device.cuda import open_device, reclaim, side_stream, wait_for_stream
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.faults import is_device_fault, is_out_of_memory
from cortex.runtime.device.follower import Follower
from cortex.runtime.device.grammar import Grammars
from cortex.runtime.device.leader import Leader
from cortex.runtime.device.load_progress import Progress
from cortex.runtime.device.membership import Answered, FollowerLoaded, Joined, Membership, Share
from cortex.runtime.device.memory import DeviceMemory, Limits, Needs, settle
from cortex.runtime.device.model_runner import (
    BLOCK_TOKENS,
    ModelRunner,
    Runner,
    ServableModel,
    kv_bytes_per_token,
    state_bytes,
    state_copy_bytes,
)
from cortex.runtime.device.refusal import DeviceLost, Refused
from cortex.runtime.device.rendezvous import RefusedElsewhere, SharedLoad
from cortex.runtime.device.sampler import sampling_bytes
from cortex.runtime.device.scheduler import SCORED_ROWS
from cortex.runtime.device.vocabulary import Vocabulary
from cortex.runtime.device.workspace import Workspace, measure_workspace

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
        quant: str | None,
        group: Group,
        cache_directory: Path | None,
    ) -> ServableModel:
        """Read the weights at *path*; raise CheckpointError, in words."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to step, and what to tell the supervisor."""

    engine: Engine
    event: ModelLoaded
    share: Share | None = None
    """Of one that is spread over a group."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model that will not be there, and what to tell the supervisor."""

    model: str
    event: Failed


LoadOutcome = Loaded | FollowerLoaded | LoadFailed | DeviceLost
Outcome = LoadProgress | LoadOutcome | Joined | Answered
Job = Callable[[], Outcome]


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
        self.beat = beat
        """Say what this thread does; for the jobs that it is given."""
        self._clock = clock
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._wake_up = wake_up()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    @property
    def fd(self) -> int:
        """Readable when ``take`` has something to give."""
        return self._wake_up.fd

    def start(self, command: LoadModel, membership: Membership | None = None) -> None:
        """Queue a load, of a model that is spread over a group where there is a *membership*."""
        self.do(partial(self._attempt, command, membership))

    def refuse(self, command: LoadModel, membership: Membership, refused: Refused) -> None:
        """Queue a load that is not even tried here: the other ranks wait to hear of it."""
        self.do(partial(_give_up, command, membership.place.begin_load, refused))

    def do(self, job: Job) -> None:
        """Queue anything else that waits; what it raises is a DeviceLost."""
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put(job)

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
            self._jobs.put(None)
        else:
            self._wake_up.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.beat(Activity.LOADING)
            self._outcomes.put(self._outcome(job))
            self.beat(Activity.IDLE)
            del job  # nothing here refers to the model any more: an unload now frees all of it
            self._wake()
        self._wake_up.close()

    def _report(self, progress: LoadProgress) -> None:
        self._outcomes.put(progress)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_up.fd, 1)

    def _outcome(self, job: Job) -> Outcome:
        """Do it, and return whatever came of it; a failed load's memory is given back by then."""
        try:
            open_device(self._device)
            outcome = job()
            if isinstance(outcome, LoadFailed):
                reclaim(self._device)
        except DeviceLost as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - the thread must outlive it, and the main one know
            return DeviceLost(f"in the loader thread: {exc}")
        return outcome

    def _attempt(self, command: LoadModel, membership: Membership | None) -> LoadOutcome:
        shared = membership.place.begin_load() if membership else None
        try:
            with side_stream(self._device):
                return self._load(command, membership, shared)
        except Exception as exc:  # noqa: BLE001 - whatever it was, the steps of the others go on
            outcome = _failure(command, exc)
            if shared is not None:
                shared.give_up(None if isinstance(exc, RefusedElsewhere) else _words(outcome))
            return outcome

    def _load(
        self, command: LoadModel, membership: Membership | None, shared: SharedLoad | None
    ) -> Loaded | FollowerLoaded:
        began = self._clock()
        model = self._read(command, shared)
        self.beat(Activity.LOADING)
        workspace = self._workspace(command, model)
        reclaim(self._device)  # what measuring left with torch's allocator counts as taken
        self.beat(Activity.LOADING)
        needs = _needs(model, workspace)
        limits = settle(command, needs, self._memory.free_bytes(model.weights_bytes))
        if shared:
            limits = shared.agree(limits)
        cache = model.new_cache(limits.blocks, BLOCK_TOKENS, limits.state_slots)
        kind = AsyncRunner if self._device.type == "cuda" else ModelRunner
        runner = kind(model, cache, self._device, max_sequences=limits.max_sequences)
        wait_for_stream(self._device)
        if runner.buffer_bytes:
            reclaim(self._device)  # what warming up left there
        beyond = max(0, runner.buffer_bytes - workspace.graph_bytes)
        footprint = Footprint(model.weights_bytes, cache.bytes, limits.workspace_bytes + beyond)
        share = self._share(membership, shared)
        event = _model_loaded(command, limits, footprint, self._clock() - began)
        loaded: Loaded | FollowerLoaded
        if share is not None and share.membership.place.rank:
            loaded = FollowerLoaded(Follower(command.model, runner), event, share)
        else:
            loaded = Loaded(self._engine(command, model, runner, limits, share), event, share)
        self._memory.hold(command.model, footprint)
        return loaded

    def _read(self, command: LoadModel, shared: SharedLoad | None) -> ServableModel:
        """Read the weights, of a *shared* model this rank's part of them."""
        look = shared.look if shared else lambda: None
        progress = Progress(command, self._clock, self._memory, self._report, look)

        def on_progress(bytes_done: int, bytes_total: int) -> None:
            self.beat(Activity.LOADING)
            progress.tell(bytes_done, bytes_total)

        return self._load_model(
            Path(command.path),
            device=self._device,
            dtype=command.dtype,
            on_progress=on_progress,
            quant=command.quant,
            group=shared.begin() if shared else ALONE,
            cache_directory=Path(command.quant_cache) if command.quant_cache else None,
        )

    def _share(self, membership: Membership | None, shared: SharedLoad | None) -> Share | None:
        """Return this rank's part of a model that can step on all of them by now."""
        if membership is None or shared is None:
            return None
        return Share(membership, shared.be_ready())

    def _engine(
        self,
        command: LoadModel,
        model: ServableModel,
        runner: Runner,
        limits: Limits,
        share: Share | None,
    ) -> Engine:
        if share is not None:
            runner = Leader(command.model, runner, share.membership.broadcast)
        path = Path(command.path)
        return Engine(
            command.model,
            runner,
            limits,
            token_budget=self._token_budget,
            device_type=self._device.type,
            options=self._options,
            grammars=Grammars(partial(Vocabulary.from_checkpoint, path), model.vocab_size),
            special_ids=_special_ids(path) if limits.state_slots else frozenset(),
        )

    def _workspace(self, command: LoadModel, model: ServableModel) -> Workspace:
        sequences = command.max_sequences or DEFAULT_SEQUENCES
        beside_bytes = sampling_bytes(sequences + SCORED_ROWS, model.vocab_size)
        beside_bytes += state_copy_bytes(model)
        has_graphs = self._device.type == "cuda" and self._options.cuda_graphs
        if self._device.type == "cuda":
            beside_bytes += kv_bytes_per_token(model) * BLOCK_TOKENS  # the scratch block
            beside_bytes += state_bytes(model)  # and the scratch slot
            beside_bytes += CUDA_LIBRARY_BYTES
        return measure_workspace(
            model,
            self._device,
            max(self._token_budget, sequences),
            beside_bytes,
            graph_rows=buckets(sequences) if has_graphs else (),
        )


def _needs(model: ServableModel, workspace: Workspace) -> Needs:
    return Needs(
        max_position_embeddings=model.max_position_embeddings,
        kv_bytes_per_token=kv_bytes_per_token(model),
        block_tokens=BLOCK_TOKENS,
        workspace=workspace,
        weights_bytes=model.weights_bytes,
        state_bytes=state_bytes(model),
    )


def _special_ids(path: Path) -> frozenset[int]:
    """Return the tokens of no text; none where the checkpoint came without a vocabulary."""
    try:
        return Vocabulary.from_checkpoint(path).control_ids
    except (CheckpointError, OSError) as exc:
        _log.info("no special tokens are known", path=str(path), reason=str(exc))
        return frozenset()


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


def _give_up(
    command: LoadModel, begin: Callable[[], SharedLoad], refused: Refused
) -> LoadFailed | DeviceLost:
    outcome = _failure(command, refused)
    begin().give_up(_words(outcome))
    return outcome


def _words(outcome: LoadFailed | DeviceLost) -> Failed:
    """Return what the other ranks are told of it."""
    return outcome.event if isinstance(outcome, LoadFailed) else Failed(PEER_LOST, str(outcome))
