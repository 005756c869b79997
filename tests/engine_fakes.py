"""A model that recalls what it was told, and a device process without the process.

``RecallingModule`` computes the next token from every token and position of its sequence, *as it
finds them in the paged cache*: a wrong block table, slot or position, or a chunk that was left out,
changes what it says. ``next_token`` is the same arithmetic on a plain list.

``RecurrentModule`` says the same, and keeps a state in its slot beside the cache: where that is not
what the cache tells, because a token was applied to it twice, say, it says something else.
"""

from __future__ import annotations

import math
import select
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cortex.ipc.errors import ProtocolError
from cortex.ipc.heartbeat import Activity
from cortex.ipc.messages import (
    Command,
    Embed,
    EngineReport,
    Event,
    Failed,
    Generate,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    SamplingParams,
)
from cortex.ipc.post import Letters
from cortex.ipc.ring import Flag, TokenConsumer, TokenProducer, TokenRecord, TokenRing
from cortex.ipc.taps import Tap
from cortex.models.batch import Batch, CacheShape, KVCache, RecurrentState, StateShape
from cortex.models.checkpoints.pooling import Pooling
from cortex.models.execution import DEFAULT, Execution
from cortex.runtime.device.cuda import measured_free_bytes
from cortex.runtime.device.device import Device
from cortex.runtime.device.loader import Loader, LoadFunction
from cortex.runtime.device.memory import DeviceMemory
from cortex.runtime.device.model_runner import ServableModel

VOCABULARY = 97
HIDDEN = 3
PRIME = 65521
ATTENTION = CacheShape(layers=1, kv_heads=1, head_dim=1)
UNHEALTHY_TOKEN = 96
"""A prompt that ends with it gets NaN for logits."""


def next_token(tokens: list[int], variety: int = UNHEALTHY_TOKEN) -> int:
    """Return what the module says after *tokens*; never UNHEALTHY_TOKEN."""
    return sum((token + 1) * (at + 1) for at, token in enumerate(tokens)) % variety


def answer(prompt: list[int], tokens: int, variety: int = UNHEALTHY_TOKEN) -> list[int]:
    """Return the greedy continuation of *prompt*."""
    known = list(prompt)
    for _ in range(tokens):
        known.append(next_token(known, variety))
    return known[len(prompt) :]


def state(said: int | None) -> list[float]:
    """Return the hidden state of a token after which the module says *said*."""
    if said is None:
        return [math.nan] * HIDDEN
    return [1.0 + said, 0.1 * said, 1 / (1 + said)]


def vector(prompt: list[int], pooling: Pooling) -> list[float]:
    """Return the embedding of *prompt*, in float64."""
    states = [state(next_token(prompt[: at + 1])) for at in range(len(prompt))]
    pooled = (
        states[-1] if pooling == "last" else [sum(column) for column in zip(*states, strict=True)]
    )
    return [number / math.hypot(*pooled) for number in pooled]


def greedy(max_tokens: int, stop_token_ids: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(0.0, max_tokens, 0, stop_token_ids=stop_token_ids)


class RecallingModule(nn.Module):
    """See the file's docstring; ``errors`` are raised by the next steps, one each.

    It says tokens below *variety*: of a few only, it repeats itself. Where ``poison`` is among what
    the cache holds of a sequence, its logits are NaN.
    """

    def __init__(self, variety: int = UNHEALTHY_TOKEN) -> None:
        super().__init__()
        self.variety = variety
        self.errors: list[BaseException] = []
        self.poison: int | None = None
        self.steps = 0

    def forward(self, batch: Batch) -> Tensor:
        self._write(batch)
        return torch.stack([self._row(batch, index) for index in batch.sampled.tolist()])

    def hidden(self, batch: Batch) -> Tensor:
        """Return for every token a state [HIDDEN] that tells what is before it in the cache."""
        self._write(batch)
        said = [self._said(batch, index) for index in range(len(batch.token_ids))]
        return torch.tensor([state(token) for token in said], device=batch.slots.device)

    def _write(self, batch: Batch) -> None:
        self.steps += 1
        if self.errors:
            raise self.errors.pop(0)
        keys, values = batch.cache.keys[0].view(-1), batch.cache.values[0].view(-1)
        keys[batch.slots] = batch.token_ids.float()
        values[batch.slots] = batch.positions.float()

    def _row(self, batch: Batch, index: int) -> Tensor:
        said = self._said(batch, index)
        if said is None:
            return torch.full((VOCABULARY,), torch.nan, device=batch.slots.device)
        ids = torch.arange(VOCABULARY, device=batch.slots.device)
        return -((ids - said) % VOCABULARY).float() * 0.1

    def _said(self, batch: Batch, index: int) -> int | None:
        """Return what comes after a token of the batch; None where it is UNHEALTHY_TOKEN."""
        total = self._total(batch, index)
        return None if total is None else total % self.variety

    def _total(self, batch: Batch, index: int) -> int | None:
        sequence = int((batch.query_starts <= index).sum()) - 1
        block_tokens = batch.cache.block_tokens
        at = torch.arange(int(batch.positions[index]) + 1, device=batch.slots.device)
        slots = batch.block_tables[sequence, at // block_tokens] * block_tokens + at % block_tokens
        tokens = batch.cache.keys[0].view(-1)[slots].long()
        positions = batch.cache.values[0].view(-1)[slots].long()
        if int(tokens[-1]) == UNHEALTHY_TOKEN or self.poison in tokens.tolist():
            return None
        return int(((tokens + 1) * (positions + 1)).sum())


class RecurrentModule(RecallingModule):
    """Its state is how many tokens came before, and their sum as ``next_token`` weighs them.

    An error is raised after the step has changed the states, as one in a later layer would be.
    """

    def _write(self, batch: Batch) -> None:
        state, slots = batch.cache.states[0], batch.state_slots
        assert slots is not None, "the cache has states"
        ends = batch.query_starts.tolist()
        self._states: list[tuple[int, int]] = []  # after each token of the batch
        for slot, begin, end in zip(slots.tolist(), ends, ends[1:], strict=False):
            count, total = int(state.conv[slot]), int(state.delta[slot])
            if not int(batch.positions[begin]):
                count, total = 0, 0
            for token in batch.token_ids[begin:end].tolist():
                count, total = count + 1, (total + (token + 1) * (count + 1)) % PRIME
                self._states.append((count, total))
            state.conv[slot], state.delta[slot] = count, total
        super()._write(batch)

    def _said(self, batch: Batch, index: int) -> int | None:
        total = self._total(batch, index)
        if total is None:
            return None
        is_right = self._states[index] == (int(batch.positions[index]) + 1, total % PRIME)
        return (total + (not is_right)) % self.variety


@dataclass
class FakeModel:
    """A loaded model around a RecallingModule: 8 bytes of cache per token."""

    module: RecallingModule = field(default_factory=RecallingModule)
    caches: CacheShape = ATTENTION
    kv_dtype: torch.dtype = torch.float32
    vocab_size: int = VOCABULARY
    max_position_embeddings: int = 2048
    weights_bytes: int = 1000
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def new_cache(self, blocks: int, block_tokens: int, state_slots: int = 0) -> KVCache:
        shape = (blocks, block_tokens, 1, 1)
        keys, values = (torch.full(shape, -1.0, device=self.device) for _ in range(2))
        conv = torch.full((state_slots, 1, 1), -1.0, device=self.device)
        state = RecurrentState(conv, conv.clone().unsqueeze(1))
        return KVCache(
            keys=[keys],
            values=[values],
            block_tokens=block_tokens,
            states=[state] if self.caches.state else [],
        )

    def recorded(self, cache: KVCache, max_sequences: int) -> Callable[[Batch], Tensor]:
        del cache, max_sequences
        return self.module


def recurrent_model(variety: int = UNHEALTHY_TOKEN) -> FakeModel:
    """Return one whose states take 8 bytes a slot."""
    shape = StateShape(layers=1, channels=1, kernel=2, heads=1, key_dim=1, value_dim=1)
    return FakeModel(RecurrentModule(variety), CacheShape(1, 1, 1, shape))


class FakeLoad:
    """``load_model``: gives out ``models`` by path, once ``may_finish`` is set."""

    def __init__(self, **models: FakeModel) -> None:
        self.models = {f"/{name}": model for name, model in models.items()}
        self.errors: dict[str, Exception] = {}
        self.progress: list[tuple[int, int]] = []
        self.asked: list[tuple[str, str]] = []
        self.executions: list[Execution] = []
        self.started = threading.Event()
        self.may_finish = threading.Event()
        self.may_finish.set()

    def __call__(
        self,
        path: Path,
        *,
        device: torch.device,
        dtype: str,
        on_progress: Callable[[int, int], None],
        execution: Execution = DEFAULT,
        **rest: object,
    ) -> ServableModel:
        self.rest = rest
        self.executions.append(execution)
        self.asked.append((device.type, dtype))
        self.started.set()
        assert self.may_finish.wait(20.0), "the test never let the load finish"
        for done, total in self.progress:
            on_progress(done, total)
        if str(path) in self.errors:
            raise self.errors[str(path)]
        return self.models[str(path)]


class FakeChannel:
    """The child's end of the channel: what the test puts in, and what came out.

    Waiting ends also when the test has something to look at: an event, or records in the ring.
    """

    def __init__(self, ring: TokenRing) -> None:
        self.commands: deque[Command | ProtocolError] = deque()
        self.events: list[Event] = []
        self.reports: list[EngineReport] = []
        """Those events that nobody asked for."""
        self._ring = ring
        self._events_at_last_wait = 0

    def send(self, event: Event) -> None:
        if isinstance(event, EngineReport):
            self.reports.append(event)
        else:
            self.events.append(event)

    def receive_waiting(self) -> Command | None:
        if not self.commands:
            return None
        command = self.commands.popleft()
        if isinstance(command, ProtocolError):
            raise command
        return command

    def wait(self, _timeout_seconds: float | None, *also: int) -> None:
        before, self._events_at_last_wait = self._events_at_last_wait, len(self.events)
        if not self.commands and len(self.events) == before:
            readable = select.select([*also, self._ring.filled.fd], [], [], 20.0)[0]
            assert readable, "asleep, and nothing will come"


class DeviceBench:
    """A Device with a real loader and a real ring, driven turn by turn by the test."""

    def __init__(
        self,
        load: LoadFunction,
        *,
        memory_bytes: int = 2**24,
        token_budget: int = 512,
        ring_capacity: int = 1024,
        device: str = "cpu",
        tap: Tap | None = None,
        letters: Letters | None = None,
    ) -> None:
        place = torch.device(device)
        self.ring = TokenRing(ring_capacity)
        self.channel = FakeChannel(self.ring)
        self.consumer = TokenConsumer(self.ring)
        self.memory = DeviceMemory(memory_bytes, lambda: measured_free_bytes(place))
        self.beats: list[Activity] = []
        self.loader_beats: list[Activity] = []
        self.loader = Loader(
            load, place, self.memory, token_budget=token_budget, beat=self.loader_beats.append
        )
        self.device = Device(
            place,
            channel=self.channel,
            producer=TokenProducer(self.ring),
            loader=self.loader,
            memory=self.memory,
            tap=tap or Tap(None, device),
            letters=letters,
            beat=self.beats.append,
        )
        self.records: list[TokenRecord] = []
        self._last_command_id = 0

    def close(self) -> None:
        self.loader.close()
        if self.loader._thread.is_alive():
            self.loader._thread.join(20.0)
        self.consumer.close()
        self.ring.close()

    def command_id(self) -> int:
        self._last_command_id += 1
        return self._last_command_id

    def send(self, command: Command | ProtocolError) -> None:
        self.channel.commands.append(command)

    def ask(self, command: Command) -> Event:
        """Send *command*, run until it is answered, and return the answer."""
        self.send(command)
        self.run_until(lambda: bool(self.answers(command.command_id)))
        return self.answers(command.command_id)[0]

    def load(self, model: str, **limits: Any) -> Event:
        """Load *model* and return the answer."""
        return self.ask(LoadModel(self.command_id(), model, f"/{model}", "auto", **limits))

    def generate(
        self,
        sequence_id: int,
        prompt: list[int],
        sampling: SamplingParams | None = None,
        *,
        model: str = "m",
    ) -> None:
        sampling = sampling or greedy(8)
        self.send(Generate(self.command_id(), sequence_id, model, prompt, sampling))

    def embed(self, prompt: list[int], *, model: str = "m") -> int:
        """Ask for the mean of *prompt*; return the command's number."""
        command_id = self.command_id()
        self.send(Embed(command_id, model, prompt, "mean"))
        return command_id

    def answers(self, command_id: int) -> list[Event]:
        """Return what has answered a command so far."""
        return [
            event
            for event in self.channel.events
            if getattr(event, "command_id", None) == command_id
            and not isinstance(event, LoadProgress)
        ]

    def turn(self) -> None:
        self.device.turn()
        self.records += self.consumer.take()

    def run_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(20_000):
            if condition():
                return
            self.turn()
        raise AssertionError("it never came to that")

    def run_until_ended(self, *sequence_ids: int) -> None:
        self.run_until(lambda: all(self.has_ended(number) for number in sequence_ids))

    def has_ended(self, sequence_id: int) -> bool:
        return bool(self.finish(sequence_id)) or sequence_id in self.failures()

    def tokens(self, sequence_id: int) -> list[int]:
        """Return the tokens published so far."""
        of_it = [record for record in self.records if record.sequence_id == sequence_id]
        return [record.token_id for record in of_it if record.flags & Flag.TOKEN]

    def finish(self, sequence_id: int) -> Flag:
        """Return how the sequence finished; no flags where it has not."""
        flags = [Flag(record.flags) for record in self.records if record.sequence_id == sequence_id]
        finishes = [flag & Flag.FINISH for flag in flags if flag & Flag.FINISH]
        assert len(finishes) <= 1, "a sequence finishes once"
        assert not finishes or flags[-1] & Flag.FINISH, "nothing comes after a finish"
        return finishes[0] if finishes else Flag(0)

    def failures(self) -> dict[int, str]:
        """Return the codes of the sequences that failed."""
        return {
            event.sequence_id: event.code
            for event in self.channel.events
            if isinstance(event, Failed) and event.sequence_id is not None
        }


def loaded(event: Event) -> ModelLoaded:
    """Return *event*, which says that a model was loaded."""
    assert isinstance(event, ModelLoaded), event
    return event


def code_of(event: Event) -> str:
    """Return the code of *event*, which says that something failed."""
    assert isinstance(event, Failed), event
    return event.code
