"""What stands behind a supervisor, doubled: no processes, no files.

FakeDeviceProcess   one life of a device process: keeps the contract, plays what the test says
FakePost            keeps what it was sent for each group
FakeDevices         begins such lives: ``Supervisor(..., begin_life=devices.begin)``
FakeModelFiles      fetches and reads nothing: ``Supervisor(..., files=files)``
FakeClock           moves when told to
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar, cast

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.errors import NodeFailed
from cortex.ipc.messages import (
    PROTOCOL_VERSION,
    Bye,
    CacheCleared,
    Cancel,
    CheckCollective,
    ClearPrefixCache,
    CollectiveChecked,
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    Footprint,
    Generate,
    GroupJoined,
    GroupLeft,
    Hello,
    JoinGroup,
    LeaveGroup,
    LoadModel,
    LoadProgress,
    MemoryReport,
    Message,
    ModelLoaded,
    ModelUnloaded,
    Ping,
    Pong,
    QueryMemory,
    Shutdown,
    UnloadModel,
)
from cortex.ipc.node_api import LoadRequest
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime import preflight
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_conversation import Conversation, Progress
from cortex.runtime.device_life import End, OnGone, OnHello
from cortex.runtime.device_state import Cause
from cortex.runtime.estimates import Estimate
from cortex.runtime.served_model import InSitu
from cortex.runtime.text import TextSide

C = TypeVar("C", bound=Message)
MIB = 2**20
VECTOR = array("f", [0.6, 0.8]).tobytes()
FOOTPRINT = Footprint(weights_bytes=90 * MIB, kv_bytes=9 * MIB, workspace_bytes=MIB)


def hello(device: str = "cpu:0", pid: int = 1) -> Hello:
    """Return what a healthy device process says first."""
    return Hello(PROTOCOL_VERSION, device, pid, preloaded=True, server_threads=1, torch_version="2")


def records(
    sequence_id: int, token_ids: list[int], finish: Flag | None = None
) -> list[TokenRecord]:
    """Return the records of *token_ids*, the last one with *finish*."""
    flags = [int(Flag.TOKEN)] * len(token_ids)
    if finish is not None:
        flags[-1] |= finish
    return [
        TokenRecord(sequence_id, token_id, -0.5, flag)
        for token_id, flag in zip(token_ids, flags, strict=True)
    ]


async def eventually(
    condition: Callable[[], object], what: str, within_seconds: float = 10.0
) -> None:
    """Return once *condition* holds; fail naming *what* after that time."""
    end = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.002)


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakePost:
    """What a device was sent beside its commands: how many descriptors, by group."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.error: OSError | None = None

    def send(self, group: str, descriptors: Sequence[Descriptor]) -> None:
        if self.error is not None:
            raise self.error
        assert all(descriptor.fd >= 0 for descriptor in descriptors)
        self.sent[group] = len(descriptors)


class FakeDeviceProcess:
    """One life: answers every command as a good device process would, but those of *silent_on*.

    A Generate gets the script's tokens and a STOP, an Embed VECTOR. What it does not do by itself,
    the test does: ``says``, ``writes``, ``dies``.
    """

    def __init__(self, devices: FakeDevices, spec: DeviceSpec, ids: itertools.count[int]) -> None:
        self.conversation = Conversation(self._take, ids)
        self.post = FakePost()
        self.received: list[Command] = []
        self.pid: int | None = next(devices.pids)
        self._devices = devices
        self._spec = spec
        self._end = asyncio.Event()
        self._reason = ""
        self._cause = Cause.DIED
        self.last_cause: Cause | None = None
        """What its last words, which come after its end, make of it."""

    @property
    def cause(self) -> Cause | None:
        return self._cause if self._end.is_set() else None

    async def run(self, on_hello: OnHello, on_gone: OnGone) -> End:
        if (may_start := self._devices.may_start.get(self._spec.index)) is not None:
            await may_start.wait()
        if self._devices.starts:
            on_hello(hello(self._spec.name, self.pid or 0))
        else:
            self.dies("it never said Hello")
        await self._end.wait()
        on_gone()
        self.conversation.end(NodeFailed(self._reason))
        return End(self.last_cause or self._cause, self._reason)

    def kill(self, cause: Cause, reason: str) -> None:
        if not self._end.is_set():
            self._cause = cause
        self.dies(reason)

    def dies(self, reason: str = "it was killed by SIGKILL") -> None:
        """End this life."""
        self._reason = self._reason or reason
        self._end.set()

    def says(self, event: Event) -> None:
        """Let *event* arrive."""
        self.conversation.hear(event)

    def writes(self, sequence_id: int, token_ids: list[int], finish: Flag | None = None) -> None:
        """Let token records arrive."""
        self.conversation.receive(records(sequence_id, token_ids, finish))

    def last(self, kind: type[C]) -> C:
        """Return the last command of *kind* that was received."""
        return next(command for command in reversed(self.received) if isinstance(command, kind))

    def answers(self, command: Command) -> None:  # noqa: C901, PLR0912 - a few lines per command
        """Answer as a good device process would."""
        match command:
            case Ping():
                self.says(Pong(command.command_id))
            case LoadModel():
                self.says(LoadProgress(command.command_id, command.model, 50, 100))
                self.says(loaded(command))
            case UnloadModel():
                self.says(ModelUnloaded(command.command_id, command.model))
            case Generate():
                self.writes(command.sequence_id, self._devices.tokens, Flag.STOP)
            case Embed():
                self.says(Embedded(command.command_id, VECTOR))
            case Cancel(sequence_id=int(number)) if number in self.conversation.vectors:
                self.says(Failed("cancelled", "the embedding was cancelled", number))
            case Cancel():
                self.conversation.receive(
                    [TokenRecord(command.sequence_id, 0, math.nan, Flag.CANCELLED)]
                )
            case QueryMemory():
                self.says(MemoryReport(command.command_id, 1, 1, {}))
            case ClearPrefixCache():
                self.says(CacheCleared(command.command_id, command.model, 7))
            case JoinGroup():
                self.says(GroupJoined(command.command_id, command.group, "gloo"))
            case CheckCollective():
                joined = next(c for c in reversed(self.received) if isinstance(c, JoinGroup))
                right = joined.ranks * (joined.ranks + 1) / 2
                total = self._devices.sums.get(self._spec.index, right)
                self.says(CollectiveChecked(command.command_id, command.group, total))
            case LeaveGroup():
                self.says(GroupLeft(command.command_id, command.group))
            case Shutdown():
                self.says(Bye(command.command_id))
                self.dies("it exited with status 0")

    def refuses(self, command: Command, code: str, detail: str, **numbers: int) -> None:
        """Answer *command* with a Failed."""
        self.says(Failed(code, detail, command.command_id, numbers=numbers))

    def _take(self, command: Command) -> None:
        self.received.append(command)
        if type(command) not in self._devices.silent_on and not self._end.is_set():
            asyncio.get_running_loop().call_soon(self.answers, command)


class FakeDevices:
    """The lives of all devices, and what they have in common."""

    def __init__(self) -> None:
        self.lives: dict[int, list[FakeDeviceProcess]] = {}
        self.silent_on: set[type[Command]] = set()
        self.tokens = [1, 2, 3]
        self.sums: dict[int, float] = {}
        """What devices say that their group adds up to, where that is wrong."""
        self.may_start: dict[int, asyncio.Event] = {}
        """Gates of devices whose next lives take their time to say Hello."""
        self.starts = True
        """False: the next lives die without a Hello."""
        self.pids = itertools.count(70001)

    def begin(self, spec: DeviceSpec, ids: itertools.count[int]) -> FakeDeviceProcess:
        """Begin a life."""
        life = FakeDeviceProcess(self, spec, ids)
        self.lives.setdefault(spec.index, []).append(life)
        return life

    def now(self, index: int = 0) -> FakeDeviceProcess:
        """Return the last life of a device."""
        return self.lives[index][-1]


class FakeModelFiles:
    """Files that are where they should be, once ``may_fetch`` is set; or whatever is wrong."""

    def __init__(self) -> None:
        self.may_fetch = asyncio.Event()
        self.may_fetch.set()
        self.may_examine = asyncio.Event()
        self.may_examine.set()
        self.examined: list[tuple[str, int]] = []
        self.verdict: Exception | None = None
        """What their headers say."""
        self.estimate_bytes: int | None = None
        self.estimate_is: Estimate | None = None
        self.estimated_for: list[tuple[str, int]] = []
        """Models whose loads were estimated, and for which device."""
        self.measured: list[Footprint | None] = []
        """What each examined model was said to have held before."""
        self.fetching: list[str] = []
        self.stopped: list[str] = []
        self.read_with: dict[str, int] = {}
        """The free bytes that each model was judged by."""
        self.error: Exception | None = None
        self.is_closed = False

    def refuse(self, request: LoadRequest) -> None:
        preflight.check_request(request)

    async def examine(
        self, request: LoadRequest, free_bytes: int, measured: Footprint | None = None
    ) -> int | None:
        self.examined.append((request.model_id, free_bytes))
        self.measured.append(measured)
        await self.may_examine.wait()
        if self.verdict is not None:
            raise self.verdict
        return self.estimate_bytes

    async def estimate(
        self, request: LoadRequest, device: DeviceSpec, measured: Footprint | None = None
    ) -> Estimate | None:
        self.measured.append(measured)
        self.estimated_for.append((request.model_id, device.index))
        await self.may_examine.wait()
        if self.verdict is not None:
            raise self.verdict
        return self.estimate_is

    async def fetch(self, request: LoadRequest, progress: Progress) -> Path:
        self.fetching.append(request.model_id)
        progress(25, 100)
        try:
            await self.may_fetch.wait()
        except asyncio.CancelledError:
            self.stopped.append(request.model_id)
            raise
        return Path("/models") / request.model_id

    async def read(
        self,
        path: Path,
        request: LoadRequest,
        free_bytes: int,
        measured: Footprint | None = None,
    ) -> TextSide:
        self.read_with[request.model_id] = free_bytes
        self.measured.append(measured)
        if self.error is not None:
            raise self.error
        return cast("TextSide", SimpleNamespace(path=path))  # the supervisor only keeps it

    async def in_situ(self, path: Path, request: LoadRequest) -> InSitu | None:  # noqa: ARG002 - a protocol
        return InSitu(request.quant, Path("/cache")) if request.quant else None

    def close(self) -> None:
        self.is_closed = True


def loaded(command: LoadModel) -> ModelLoaded:
    """Return the good answer to *command*."""
    return ModelLoaded(
        command.command_id,
        command.model,
        FOOTPRINT,
        max_context_tokens=2048,
        max_sequences=8,
        kv_cache_tokens=4096,
        load_seconds=0.1,
    )
