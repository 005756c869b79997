"""The device process's loop: commands in, steps of every model, records and events out.

One thread does it all, in turns: take every command that waits, install what the loader finished,
let the next model that has work (round robin) make one step, publish its records with one write
and send its events after them. So a command takes effect between two steps, and a load, which
has a thread of its own, never holds one up. With nothing to do it sleeps in the channel.

A full ring holds the steps back. It is waited for in slices of 0.1 s, between which commands are
still read (and kept for later), so that a Shutdown gets through: what the ring cannot take is then
dropped.

A frame that is not a command is answered with Failed(protocol_error). It may have been a request
that somebody waits for, so the supervisor ends this life: everything that is open is answered then.

Of a model that is spread over a group of devices, the first rank's is an engine like any other; on
the other ranks the loop makes the steps that they are told (``groups.py``), one a turn, in between.

Before each of these things the thread beats (``cortex.ipc.heartbeat``), so that one that hangs in
any of them is noticed and killed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog
import torch

from cortex.ipc.errors import ProtocolError
from cortex.ipc.heartbeat import Activity
from cortex.ipc.messages import (
    Bye,
    CacheCleared,
    Cancel,
    CheckCollective,
    ClearPrefixCache,
    Command,
    Embed,
    Event,
    Failed,
    Generate,
    JoinGroup,
    LeaveGroup,
    LoadModel,
    LoadProgress,
    MemoryReport,
    ModelUnloaded,
    Ping,
    Pong,
    QueryMemory,
    Shutdown,
    UnloadModel,
)
from cortex.ipc.post import Letters
from cortex.ipc.ring import RingFull, TokenRecord
from cortex.ipc.taps import Tap
from cortex.runtime.device.cuda import open_device, reclaim, wait_for_stream
from cortex.runtime.device.engine import Engine, StepReport
from cortex.runtime.device.engine_reports import EngineReports
from cortex.runtime.device.faults import is_device_fault
from cortex.runtime.device.groups import Groups
from cortex.runtime.device.loader import Loaded, Loader, LoadFailed
from cortex.runtime.device.membership import Answered, FollowerLoaded, Joined
from cortex.runtime.device.memory import DeviceMemory, refuse_bad_load
from cortex.runtime.device.refusal import DeviceLost, Refused

EXIT_OK = 0
EXIT_INTERNAL_ERROR = 70
"""A bug in the loop itself (EX_SOFTWARE)."""
EXIT_DEVICE_LOST = 71
"""The device's context is broken, or could not be made (EX_OSERR)."""

RING_WAIT_SECONDS = 0.1
_log = structlog.get_logger()


class Channel(Protocol):
    """``cortex.ipc.channel.DeviceEnd``."""

    def send(self, event: Event) -> None:
        """Send *event*."""

    def receive_waiting(self) -> Command | None:
        """Return the next command that has arrived, or None; raise ProtocolError."""

    def wait(self, timeout_seconds: float | None, *also: int) -> None:
        """Return when a command has arrived, a descriptor is readable, or in time."""


class Producer(Protocol):
    """``cortex.ipc.ring.TokenProducer``."""

    def publish(self, records: list[TokenRecord], timeout_seconds: float | None = None) -> None:
        """Write *records*; raise RingFull."""


class Device:
    """The models of one device and the only thread that steps them."""

    def __init__(
        self,
        device: torch.device,
        *,
        channel: Channel,
        producer: Producer,
        loader: Loader,
        memory: DeviceMemory,
        tap: Tap,
        letters: Letters | None = None,
        beat: Callable[[Activity], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device = device
        self._channel = channel
        self._producer = producer
        self._loader = loader
        self._memory = memory
        self._tap = tap
        self._beat = beat
        self._clock = clock
        self._reports = EngineReports(channel.send, clock)
        self._groups = Groups(device, letters, loader, channel.send)
        self._engines: dict[str, Engine] = {}
        self._turns: deque[Engine] = deque()
        self._loading: set[str] = set()
        self._commands: deque[Command] = deque()
        self._records: list[TokenRecord] = []
        self._is_stopping = False

    def serve(self) -> int:
        """Work until Shutdown, or until the device is lost; return the exit code."""
        self._beat(Activity.STEPPING)
        try:
            open_device(self._device)
            while not self._is_stopping:
                self.turn()
        except Exception as exc:  # noqa: BLE001 - the supervisor is told of every end
            _log.exception("device process gives up")
            return self._give_up(exc)
        return EXIT_OK

    def turn(self) -> None:
        """Obey what waits, make at most one step, report it; sleep if there is nothing to do."""
        self._beat(Activity.STEPPING)
        self._read_commands()
        while self._commands and not self._is_stopping:
            self._obey(self._commands.popleft())
            self._beat(Activity.STEPPING)
        self._install_loaded()
        for loaded in self._turns:
            loaded.take_compiled()
        self._publish()
        followed = self._groups.follow(self._loading)
        engine = self._next_engine()
        if engine is not None:
            self._step(engine)
        for loaded in self._turns:
            self._reports.tell(loaded)
        if engine is None and not (followed or self._commands or self._is_stopping):
            self._beat(Activity.IDLE)
            fds = [fd for loaded in self._turns for fd in loaded.fds]
            self._channel.wait(None, self._loader.fd, *fds, *self._groups.fds)

    def _give_up(self, error: Exception) -> int:
        """Say what was fatal, and return the exit code that says it too."""
        if isinstance(error, DeviceLost) or is_device_fault(error):
            code = error.code if isinstance(error, DeviceLost) else DeviceLost.code
            self._channel.send(Failed(code=code, detail=str(error), fatal=True))
            return EXIT_DEVICE_LOST
        detail = f"a bug in the device process: {type(error).__name__}"
        self._channel.send(Failed(code="internal_error", detail=detail, fatal=True))
        return EXIT_INTERNAL_ERROR

    def _read_commands(self) -> None:
        while True:
            try:
                command = self._channel.receive_waiting()
            except ProtocolError as exc:
                self._channel.send(Failed(code="protocol_error", detail=str(exc)))
                continue
            if command is None:
                return
            self._commands.append(command)

    def _obey(self, command: Command) -> None:
        try:
            self._act(command)
        except Refused as exc:
            self._channel.send(_refusal(command, exc))

    def _act(self, command: Command) -> None:
        match command:
            case Ping():
                self._channel.send(Pong(command.command_id))
            case QueryMemory():
                self._channel.send(self._memory_report(command.command_id))
            case LoadModel():
                self._load(command)
            case UnloadModel():
                self._unload(command)
            case Generate() | Embed():
                self._start(command)
            case Cancel():
                self._cancel(command.sequence_id)
            case ClearPrefixCache():
                blocks = self._engine(command.model).clear_prefix_cache()
                self._channel.send(CacheCleared(command.command_id, command.model, blocks))
            case JoinGroup() | CheckCollective() | LeaveGroup():
                self._groups.obey(command)
            case Shutdown():
                self._shut_down(command)

    def _load(self, command: LoadModel) -> None:
        membership = self._groups.membership(command.group) if command.group else None
        try:
            self._refuse_bad_load(command)
        except Refused as exc:
            if membership is None:
                raise
            self._loader.refuse(command, membership, exc)
        else:
            self._loading.add(command.model)
            self._loader.start(command, membership)

    def _refuse_bad_load(self, command: LoadModel) -> None:
        refuse_bad_load(command)
        if command.model in self._engines or command.model in self._groups:
            raise Refused("already_loaded", f"{command.model} is loaded already")
        if command.model in self._loading:
            raise Refused("already_loading", f"{command.model} is being loaded already")

    def _unload(self, command: UnloadModel) -> None:
        if command.model in self._loading:
            raise Refused("model_loading", f"{command.model} is still being loaded")
        if self._groups.follows(command.model):
            while not self._groups.drain(command.model, self._loading):
                self._install_loaded()  # the other model steps elsewhere: it only has to come over
            wait_for_stream(self._device)
        else:
            self._end_engine(self._engine(command.model))
        reclaim(self._device)
        self._groups.forget(command.model)
        self._memory.release(command.model)
        self._channel.send(ModelUnloaded(command.command_id, command.model))

    def _end_engine(self, engine: Engine) -> None:
        self._say(engine.cancel_all())
        self._publish()
        wait_for_stream(self._device)
        engine.close()
        self._turns.remove(engine)
        del self._engines[engine.model]
        self._reports.end(engine.model)

    def _start(self, command: Generate | Embed) -> None:
        sequence_id = command.sequence_id if isinstance(command, Generate) else command.command_id
        if any(sequence_id in engine for engine in self._turns):
            raise Refused("duplicate_sequence", f"sequence {sequence_id} is running")
        self._engine(command.model).start(command)

    def _cancel(self, sequence_id: int) -> None:
        for engine in self._turns:
            self._say(engine.cancel(sequence_id))

    def _say(self, last_words: list[TokenRecord | Failed]) -> None:
        for word in last_words:
            if isinstance(word, Failed):
                self._channel.send(word)
            else:
                self._records.append(word)

    def _shut_down(self, command: Shutdown) -> None:
        self._is_stopping = True
        for engine in self._turns:
            self._say(engine.cancel_all())
            engine.close()
        self._publish()
        wait_for_stream(self._device)
        self._engines.clear()
        self._turns.clear()
        reclaim(self._device)
        self._channel.send(Bye(command.command_id))

    def _engine(self, model: str) -> Engine:
        if model not in self._engines:
            raise Refused("model_not_loaded", f"{model} is not loaded on this device")
        return self._engines[model]

    def _memory_report(self, command_id: int) -> MemoryReport:
        return MemoryReport(
            command_id=command_id,
            total_bytes=self._memory.total_bytes,
            free_bytes=self._memory.free_bytes(),
            models=self._memory.held,
        )

    def _install_loaded(self) -> None:
        """Take over what the loader finished, and tell what became of the rest."""
        for outcome in self._loader.take():
            match outcome:
                case DeviceLost():
                    raise outcome
                case Loaded():
                    self._install(outcome)
                case FollowerLoaded():
                    self._loading.discard(outcome.event.model)
                    self._groups.add(outcome.event.model, outcome.share, outcome.follower)
                    self._channel.send(outcome.event)
                case LoadFailed():
                    self._loading.discard(outcome.model)
                    self._channel.send(outcome.event)
                case Joined():
                    self._groups.joined(outcome)
                case Answered():
                    self._channel.send(outcome.event)
                case LoadProgress():
                    self._channel.send(outcome)

    def _install(self, loaded: Loaded) -> None:
        engine = loaded.engine
        self._loading.discard(engine.model)
        self._engines[engine.model] = engine
        self._turns.append(engine)
        if loaded.share is not None:
            self._groups.add(engine.model, loaded.share)
        self._reports.begin(engine)
        self._channel.send(loaded.event)

    def _next_engine(self) -> Engine | None:
        """Return the model whose turn it is, among those that have work."""
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            if self._turns[-1].has_work:
                return self._turns[-1]
        return None

    def _step(self, engine: Engine) -> None:
        began = self._clock()
        self._beat(Activity.STEPPING)
        report = engine.step()
        self._records += report.records
        self._publish()
        for event in report.events:
            self._channel.send(event)
        if self._tap.wants("step"):
            self._tap.publish("step", _as_seen(engine.model, report, self._clock() - began))

    def _publish(self) -> None:
        """Write the records that wait; a full ring is waited for until a Shutdown arrives."""
        records, self._records = self._records, []
        while records:
            try:
                self._producer.publish(records, RING_WAIT_SECONDS)
            except RingFull as full:
                self._beat(Activity.BLOCKED)
                records = records[full.published :]
                self._read_commands()
                if self._is_stopping or any(isinstance(c, Shutdown) for c in self._commands):
                    return
            else:
                return


def _refusal(command: Command, refused: Refused) -> Failed:
    """A Failed that names a sequence ends it, so one about an id in use must not."""
    sequence_id = command.sequence_id if isinstance(command, Generate) else None
    if refused.code == "duplicate_sequence":
        sequence_id = None
    return Failed(refused.code, str(refused), command.command_id, sequence_id)


def _as_seen(model: str, report: StepReport, seconds: float) -> dict[str, object]:
    return {
        "model": model,
        "tokens": report.tokens,
        "sequences": report.sequences,
        "drafted": report.drafted,
        "accepted": report.accepted,
        "seconds": seconds,
    }
