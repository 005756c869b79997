"""A supervisor that plays a script, and a client of the real application in front of it.

FakeNode        devices, models and generations without any process; ``node.script`` says what the
                next generation does: batches of records, errors to raise, events to wait for
serving         the real application, over real HTTP, in front of a FakeNode
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request
from aiohttp.web_runner import BaseRunner

from cortex.ipc.errors import ApiError, ModelLoading, Recovering
from cortex.ipc.messages import EngineReport, Footprint, Hello, ReasoningBudget, SamplingParams
from cortex.ipc.node_api import (
    DeviceState,
    LoadEstimate,
    LoadRequest,
    ModelStatus,
    Progress,
    Refusal,
    Servable,
)
from cortex.ipc.ring import Flag, TokenRecord
from cortex.ipc.taps import SUPERVISOR, Tap
from cortex.runtime.access import Access
from cortex.runtime.activation import Activation
from cortex.runtime.app import build_app, build_runner, build_services
from cortex.runtime.chat import Chat
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.config import CacheConfig, DeviceSpec, NeuronConfig
from cortex.runtime.conversation import ChatPrompt, Conversation, ReasoningWish
from cortex.runtime.discovery import Gpu, Inventory, Reading
from cortex.runtime.inference import Timing
from cortex.runtime.pieces import PlainReader, Reader
from cortex.runtime.readings import Readings
from cortex.runtime.served_model import Limits, not_loaded
from cortex.runtime.text import GenerationDefaults, TextSide
from cortex.runtime.tokenizer import Tokenizer
from cortex.runtime.version import Build
from tiny_text import trained

MIB = 2**20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILD = Build("0.1.0", "0123abc", "2.13.0", None)
Step = list[TokenRecord] | ApiError | Exception | asyncio.Event


@functools.cache
def tiny_text() -> TextSide:
    """Return a small real text side: byte-level BPE, ChatML."""
    backend = trained("smollm")
    stop = backend.token_to_id("<|im_end|>")
    assert stop is not None, "it is one of the tiny tokenizer's special tokens"
    specials = {"eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(backend, specials)
    return TextSide(
        tokenizer=tokenizer,
        chat=Chat(tokenizer, ChatTemplate(CHATML, specials)),
        generation=GenerationDefaults(),
        stop_token_ids=(stop,),
        vocab_size=backend.get_vocab_size(),
    )


def says(text: str, finish: Flag | None = Flag.STOP) -> list[list[TokenRecord]]:
    """Return one batch per token of *text*, and a finish: STOP in a record of its own."""
    side = tiny_text()
    batches = [[record(token)] for token in side.text_prompt(text)]
    if finish is Flag.STOP:
        batches.append([record(side.stop_token_ids[0], Flag.TOKEN | Flag.STOP)])
    elif finish is not None:
        last = batches[-1][0]
        batches[-1] = [last._replace(flags=last.flags | finish)]
    return batches


def record(token_id: int, flags: Flag = Flag.TOKEN) -> TokenRecord:
    """Return a record of sequence 1."""
    return TokenRecord(1, token_id, float("nan"), int(flags))


def found(tokens: int) -> TokenRecord:
    """Return the record that says how much of the prompt was in the prefix cache."""
    return record(tokens, Flag.PROMPT)


class FakeText:
    """``tiny_text`` with a reader of the test's choice; it notes what it was asked for."""

    def __init__(
        self,
        reader: Callable[[], Reader] = PlainReader,
        *,
        reasons: bool = False,
        budget: ReasoningBudget | None = None,
        **changes: Any,
    ) -> None:
        self.side = dataclasses.replace(tiny_text(), **changes)
        self.reader = reader
        self.reasons = reasons
        self.budget = budget
        self.conversations: list[Conversation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.side, name)

    def chat_prompt(self, conversation: Conversation) -> ChatPrompt:
        """Render as the real one, without tools; read the answer as the test wants."""
        self.conversations.append(conversation)
        plain = dataclasses.replace(conversation, tools=(), reasoning=ReasoningWish())
        prompt = self.side.chat_prompt(plain)
        return dataclasses.replace(prompt, reader=self.reader, reasoning_budget=self.budget)


@dataclass
class FakeDevice:
    """A device at rest."""

    spec: DeviceSpec
    state: DeviceState = "ready"
    cycles: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    failure: str | None = None
    pid: int | None = None
    hello: Hello | None = None


@dataclass
class FakeModel:
    """A model in whatever state the test wants."""

    request: LoadRequest
    devices: list[FakeDevice]
    status: ModelStatus = "loaded"
    progress: Progress | None = None
    failure: str | None = None
    refusal: Refusal | None = None
    footprints: list[Footprint] = field(
        default_factory=lambda: [Footprint(93 * MIB, 40 * MIB, 5 * MIB)]
    )
    limits: Limits | None = field(default_factory=lambda: Limits(512, 8, 1024))
    engine: EngineReport | None = None
    text: Any = field(default_factory=tiny_text)
    """A TextView; or a fake of one."""

    @property
    def id(self) -> str:
        """The name it is asked by."""
        return self.request.model_id

    @property
    def servable(self) -> Servable:
        """Loaded is servable."""
        return Servable(ok=self.status == "loaded")

    def refuse_unless_loaded(self) -> None:
        """As the real one."""
        if self.status == "loading":
            raise ModelLoading("on its way", retry_after_seconds=2)
        if self.status == "recovering":
            raise Recovering("coming back", retry_after_seconds=2)
        if self.status != "loaded":
            raise not_loaded(self.id, self.failure)


class FakeGeneration:
    """Plays a script; ``cancelled`` is set once it was cancelled before the script's end."""

    def __init__(self, script: Sequence[Step]) -> None:
        self.cancelled = asyncio.Event()
        self.was_left = False
        self.is_waiting = False
        """For an event of the script."""
        self._script = list(script)

    def cancel(self) -> None:
        """Note it, unless it has ended."""
        if self._script:
            self.cancelled.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenRecord]:
        while self._script and isinstance(gate := self._script[0], asyncio.Event):
            self.is_waiting = True
            await gate.wait()
            self.is_waiting = False
            self._script.pop(0)
        if not self._script:
            raise StopAsyncIteration
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        assert isinstance(step, list)
        return step

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.was_left = True
        self.cancel()


class FakeNode:
    """What the routes see of a supervisor.

    ``scripts`` are the sequences' in turn; behind them, or without any, each plays ``script``.
    ``vectors`` are what embeddings get, by the first token of the input; one that is an exception
    is raised, one that is an event is waited for.
    """

    def __init__(self, *model_ids: str) -> None:
        self.devices = [FakeDevice(DeviceSpec(0, "cpu:0", 1024 * MIB, 2))]
        self.models: dict[str, FakeModel] = {}
        self.script: Sequence[Step] = says("Paris.")
        self.scripts: list[Sequence[Step]] = []
        self.vectors: dict[int, list[float] | Exception | asyncio.Event] = {}
        self.embedding: list[list[int]] = []
        self.embedded: list[tuple[str, list[int], str]] = []
        self.generations: list[FakeGeneration] = []
        self.asked: list[tuple[str, list[int], SamplingParams]] = []
        self.priorities: list[int] = []
        self.load_estimate = LoadEstimate()
        self.cached_blocks = 0
        """What the next clear of a prefix cache forgets."""
        self.acts: list[tuple[str, Any]] = []
        self.refusal: Exception | None = None
        self.started = asyncio.Event()
        self.load_may_end = asyncio.Event()
        self.load_may_end.set()
        self.new_models_are: ModelStatus = "loading"
        for model_id in model_ids:
            self.models[model_id] = FakeModel(LoadRequest(model_id), self.devices[:1])

    def free_bytes(self, index: int) -> int:
        """Return its whole budget, whatever is loaded."""
        return self.devices[index].spec.memory_bytes

    async def load(self, request: LoadRequest) -> FakeModel:
        """Queue it."""
        self._act("load", request)
        new = FakeModel(request, self.devices[:1], status=self.new_models_are)
        return self.models.setdefault(request.model_id, new)

    async def estimate(self, request: LoadRequest) -> LoadEstimate:
        """Return what the test wants."""
        self._act("estimate", request)
        return self.load_estimate

    async def loaded(self, model_id: str) -> FakeModel:
        """Wait until the test lets it be loaded."""
        await self.load_may_end.wait()
        self._act("loaded", model_id)
        self.models[model_id].status = "loaded"
        return self.models[model_id]

    async def unload(self, model_id: str, force: bool) -> None:
        """Forget it."""
        self._act("unload", (model_id, force))
        if self.models.pop(model_id, None) is None:
            raise not_loaded(model_id)

    async def restart_device(self, index: int, force: bool) -> None:
        """Note it."""
        self._act("restart", (index, force))

    async def clear_prefix_cache(self, model_id: str) -> int:
        """Forget what ``cached_blocks`` says."""
        self._act("clear_prefix_cache", model_id)
        if model_id not in self.models:
            raise not_loaded(model_id)
        self.models[model_id].refuse_unless_loaded()
        blocks, self.cached_blocks = self.cached_blocks, 0
        return blocks

    def generate(
        self,
        model_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        priority: int = 0,
    ) -> FakeGeneration:
        """Play ``script``."""
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((model_id, prompt_token_ids, sampling))
        self.priorities.append(priority)
        generation = FakeGeneration(self.scripts.pop(0) if self.scripts else self.script)
        self.generations.append(generation)
        self.started.set()
        return generation

    async def embed(
        self, model_id: str, token_ids: list[int], pooling: Literal["last", "mean"]
    ) -> bytes:
        """Return the vector that the test wants; ``embedding`` are those under way."""
        self.embedded.append((model_id, token_ids, pooling))
        self.embedding.append(token_ids)
        self.started.set()
        try:
            vector = self.vectors.get(token_ids[0], [0.6, 0.8])
            if isinstance(vector, Exception):
                raise vector
            if isinstance(vector, asyncio.Event):
                await vector.wait()
                vector = [0.6, 0.8]
            return array("f", vector).tobytes()
        finally:
            self.embedding.remove(token_ids)

    async def drain(self, timeout_seconds: float) -> None:
        """Note it."""
        self._act("drain", timeout_seconds)

    def _act(self, verb: str, what: Any) -> None:
        self.acts.append((verb, what))
        if self.refusal is not None:
            raise self.refusal


class FakeProbe:
    """GPUs that say what the test told them; a reading that is an exception is raised."""

    def __init__(self, *gpus: Gpu, reason: str | None = None) -> None:
        self.gpus = gpus
        self.reason = reason
        self.readings: dict[int, Reading | Exception] = {}

    def inventory(self) -> Inventory:
        """Return the GPUs."""
        return Inventory(self.gpus, unavailable_reason=self.reason)

    def read(self, gpu: Gpu) -> Reading:
        """Return, or raise, what was set."""
        reading = self.readings.get(gpu.index, Reading())
        if isinstance(reading, Exception):
            raise reading
        return reading


def application(
    node: FakeNode,
    config: NeuronConfig | None = None,
    *,
    cache: Path | None = None,
    timing: Timing | None = None,
    activation: Activation | None = None,
    probe: FakeProbe | None = None,
) -> Application:
    """Return the real application in front of *node*; needs a running loop."""
    config = config or NeuronConfig(cache=CacheConfig(str(cache or Path("/nonexistent"))))
    probe = probe or FakeProbe(reason="no NVIDIA driver is installed")
    inventory = probe.inventory()
    return build_app(
        build_services(
            config,
            node,
            access=Access.of(config),
            inventory=inventory,
            readings=Readings(probe, inventory, node.devices),
            activation=activation or Activation([]),
            tap=Tap(None, SUPERVISOR),
            build=BUILD,
            timing=timing,
        )
    )


@contextlib.asynccontextmanager
async def serving(
    node: FakeNode, **options: Any
) -> AsyncIterator[TestClient[Request, Application]]:
    """Serve *node* as the neuron does."""
    async with TestClient(Served(application(node, **options))) as client:
        yield client


class Served(TestServer):
    """aiohttp's server for tests, with the neuron's runner."""

    async def _make_runner(self, **kwargs: Any) -> BaseRunner:
        del kwargs
        return build_runner(self.app, shutdown_timeout=5.0)


@contextlib.asynccontextmanager
async def posting(
    node: FakeNode, path: str, body: Any, headers: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[ClientResponse]:
    """Serve *node* and POST *body* as JSON."""
    async with (
        serving(node, **options) as client,
        client.post(path, json=body, headers=headers) as response,
    ):
        yield response
