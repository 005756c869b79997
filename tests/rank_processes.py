"""Real device processes on ``cpu:0``, ``cpu:1``, ... that form a group over gloo."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import zmq.asyncio

from cortex.ipc.channel import SupervisorEnd
from cortex.ipc.heartbeat import HeartbeatPage
from cortex.ipc.messages import (
    CheckCollective,
    CollectiveChecked,
    Command,
    Embed,
    EngineReport,
    Event,
    Failed,
    Generate,
    GroupJoined,
    Hello,
    JoinGroup,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    ModelUnloaded,
    SamplingParams,
    UnloadModel,
)
from cortex.ipc.plan_ring import PlanRing
from cortex.ipc.post import Post
from cortex.ipc.ring import Flag, TokenConsumer, TokenRecord, TokenRing
from rank_child import run

PATIENCE_SECONDS = 60.0
MEMORY_BYTES = 2**26
CommandOf = Callable[[int], Command]
"""Of a command id."""


class RankProcess:
    """One device process, and every way to it."""

    def __init__(self, index: int, context: zmq.asyncio.Context, memory_bytes: int) -> None:
        self.index = index
        self.post = Post()
        self.records: dict[int, list[TokenRecord]] = defaultdict(list)
        self.preemptions = 0
        """Of any of its models, as far as it was heard."""
        self._channel = SupervisorEnd(context)
        self._ring = TokenRing(4096)
        self._consumer = TokenConsumer(self._ring)
        self._heartbeat = HeartbeatPage()
        self._last_id = 1000
        self._memory_bytes = memory_bytes
        self.process: ForkServerProcess | None = None

    def start(self, **options: Any) -> None:
        self.process = multiprocessing.get_context("forkserver").Process(
            target=run,
            args=(
                f"cpu:{self.index}",
                self._channel.address,
                self._ring,
                self._heartbeat,
            ),
            kwargs={
                "post": self.post.letters,
                "memory_bytes": self._memory_bytes,
                "preloaded": True,
                "server_threads": 1,
                **options,
            },
        )
        self.process.start()

    async def ask(self, command_of: CommandOf) -> Event:
        """Send a command and return what answers it."""
        self._last_id += 1
        command_id = self._last_id
        await self._channel.send(command_of(command_id))
        return await self.next_event(
            lambda event: (
                getattr(event, "command_id", None) == command_id
                and not isinstance(event, LoadProgress)
            )
        )

    async def tell(self, command: Command) -> None:
        await self._channel.send(command)

    async def next_event(self, is_it: Callable[[Event], bool]) -> Event:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                event = await self._channel.receive()
                if isinstance(event, EngineReport):
                    self.preemptions = max(self.preemptions, event.preemptions)
                if is_it(event):
                    return event
                if isinstance(event, Failed) and event.fatal:
                    raise AssertionError(f"rank {self.index} died: {event}")

    async def until_ended(self, *sequence_ids: int) -> None:
        """Take records until each of these sequences has ended in the ring."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not all(self.has_ended(number) for number in sequence_ids):
                self.take()
                await asyncio.sleep(0.002)

    def take(self) -> None:
        for record in self._consumer.take():
            self.records[record.sequence_id].append(record)

    def has_ended(self, sequence_id: int) -> bool:
        records = self.records[sequence_id]
        return bool(records) and bool(records[-1].flags & Flag.FINISH)

    def tokens(self, sequence_id: int) -> list[int]:
        return [r.token_id for r in self.records[sequence_id] if r.flags & Flag.TOKEN]

    async def exit_code(self) -> int | None:
        assert self.process is not None
        await asyncio.to_thread(self.process.join, PATIENCE_SECONDS)
        return self.process.exitcode

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(20.0)
        self._consumer.close()
        self._ring.close()
        self._heartbeat.close()
        self._channel.close()
        self.post.close()


class Ranks:
    """A group of device processes, or one alone."""

    def __init__(self, ranks: list[RankProcess], group: str | None) -> None:
        self.ranks = ranks
        self.group = group

    @property
    def leader(self) -> RankProcess:
        return self.ranks[0]

    async def ask_all(self, command_of: Callable[[int, int], Command]) -> list[Event]:
        """Ask all ranks at once; *command_of* is told the rank and the command id."""
        return await asyncio.gather(
            *(
                rank.ask(lambda command_id, at=at: command_of(at, command_id))  # type: ignore[misc] # mypy cannot infer it
                for at, rank in enumerate(self.ranks)
            )
        )

    async def load(self, path: Path, model: str = "m", **limits: Any) -> list[Event]:
        return await self.ask_all(
            lambda _, command_id: LoadModel(
                command_id, model, str(path), group=self.group, **limits
            )
        )

    async def unload(self, model: str = "m") -> list[Event]:
        """Unload as a supervisor does: the first rank, then the others."""
        first = await self.leader.ask(lambda command_id: UnloadModel(command_id, model))
        others = [
            rank.ask(lambda command_id: UnloadModel(command_id, model)) for rank in self.ranks[1:]
        ]
        return [first, *await asyncio.gather(*others)]

    async def generate(
        self, requests: dict[int, tuple[list[int], SamplingParams]], model: str = "m"
    ) -> dict[int, list[TokenRecord]]:
        """Send all of them at once; return the records of each."""
        for number, (prompt, sampling) in requests.items():
            await self.leader.tell(Generate(number, number, model, prompt, sampling))
        await self.leader.until_ended(*requests)
        return {number: self.leader.records.pop(number) for number in requests}

    async def embed(self, prompt: list[int], model: str = "m") -> Event:
        return await self.leader.ask(lambda number: Embed(number, model, prompt, "mean"))


@asynccontextmanager
async def ranks_of(
    count: int, meeting: Path, *, last_memory_bytes: int = MEMORY_BYTES, **options: Any
) -> AsyncIterator[Ranks]:
    """Have *count* processes; several have joined a group. *options* are of the last one."""
    memory = [MEMORY_BYTES] * (count - 1) + [last_memory_bytes]
    with zmq.asyncio.Context() as context:
        ranks = [RankProcess(index, context, memory[index]) for index in range(count)]
        try:
            for rank in ranks:
                rank.start(**(options if rank is ranks[-1] else {}))
            for rank in ranks:
                await rank.next_event(lambda event: isinstance(event, Hello))
            group = Ranks(ranks, "g" if count > 1 else None)
            if count > 1:
                await join(group, meeting)
            yield group
        finally:
            for rank in ranks:
                rank.close()


async def join(group: Ranks, meeting: Path, name: str = "g") -> None:
    """Make a ring, send its ends, have the ranks meet in *meeting*, and add up."""
    count, ring = len(group.ranks), PlanRing(len(group.ranks) - 1)
    for at, rank in enumerate(group.ranks):
        rank.post.send(name, ring.descriptors(at))
    ring.close()
    joined = await group.ask_all(
        lambda at, command_id: JoinGroup(command_id, name, at, count, str(meeting))
    )
    assert all(isinstance(event, GroupJoined) and event.backend == "gloo" for event in joined), (
        joined
    )
    checked = await group.ask_all(lambda _, command_id: CheckCollective(command_id, name))
    sums = [event.observed_sum for event in checked if isinstance(event, CollectiveChecked)]
    assert sums == [count * (count + 1) / 2] * count, checked


def loaded(events: Sequence[Event]) -> list[ModelLoaded]:
    """Return *events*, which say that a model was loaded."""
    assert all(isinstance(event, ModelLoaded) for event in events), events
    return [event for event in events if isinstance(event, ModelLoaded)]


def are_unloaded(events: Sequence[Event]) -> bool:
    return all(isinstance(event, ModelUnloaded) for event in events)
