"""What the HTTP side sees of the supervisor: devices and models to look at, verbs to act with.

The supervisor is the only writer of all of it. Routes are written, and tested, against these
protocols; ``supervisor.py`` and the fake node of the tests both keep them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from cortex.ipc.messages import EngineReport, Footprint, Hello, SamplingParams
from cortex.ipc.node_api import (
    DeviceState,
    LoadEstimate,
    LoadRequest,
    ModelStatus,
    Progress,
    Refusal,
    Servable,
)
from cortex.ipc.ring import TokenRecord
from cortex.runtime.answer import TokensToText
from cortex.runtime.config import DeviceSpec
from cortex.runtime.conversation import ChatPrompt, Conversation
from cortex.runtime.sampling import ModelDefaults


class TextView(Protocol):
    """The text side of a model; every call blocks."""

    @property
    def generation(self) -> ModelDefaults:
        """What the checkpoint says of sampling."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for; does not block."""

    @property
    def abilities(self) -> list[str]:
        """``completion``, and where it can ``chat``, ``tools``, ``embeddings``."""

    @property
    def takes_tools(self) -> bool:
        """Whether a conversation may offer tools."""

    @property
    def reasons(self) -> bool:
        """Whether the model may think before it answers."""

    @property
    def takes_effort(self) -> bool:
        """Whether its template has a word for how much it should think."""

    @property
    def pooling(self) -> Literal["last", "mean"] | None:
        """How the checkpoint makes one vector of a text; None where it does not."""

    def chat_prompt(self, conversation: Conversation) -> ChatPrompt:
        """Render and tokenise; raise ApiError in words."""

    def text_prompt(self, prompt: str) -> list[int]:
        """Tokenise."""

    def fill_prompt(self, before: str, after: str) -> ChatPrompt:
        """Return what asks for the text between the two; raise UnsupportedParameter."""

    @property
    def control_tokens(self) -> dict[int, bytes]:
        """The tokens that are no text, by their ids."""

    def detokenizer(self, shown_ids: Collection[int] = ()) -> TokensToText:
        """Return one for a new answer; *shown_ids* are control tokens that it shows."""


class DeviceView(Protocol):
    """One device."""

    @property
    def spec(self) -> DeviceSpec:
        """Its index, name and budget."""

    @property
    def state(self) -> DeviceState:
        """Its public state."""

    @property
    def cycles(self) -> int:
        """Loads and unloads that its process has gone through."""

    @property
    def losses(self) -> Mapping[str, int]:
        """How often its process has ended since the start, by cause."""

    @property
    def failure(self) -> str | None:
        """Why that happened the last time, in words."""

    @property
    def pid(self) -> int | None:
        """Its process, if there is one now."""

    @property
    def hello(self) -> Hello | None:
        """What its process said first; None until then."""


class LimitsView(Protocol):
    """What the device settled on when it loaded the model."""

    @property
    def max_context_tokens(self) -> int:
        """Prompt and answer together."""

    @property
    def max_sequences(self) -> int:
        """Sequences that it computes at a time."""

    @property
    def kv_cache_tokens(self) -> int:
        """Positions that all sequences share."""


class ModelView(Protocol):
    """One model that was asked for; limits and text are None until it is loaded."""

    @property
    def id(self) -> str:
        """The name it is asked by."""

    @property
    def request(self) -> LoadRequest:
        """How it was asked for."""

    @property
    def status(self) -> ModelStatus:
        """Its public state."""

    @property
    def footprints(self) -> Sequence[Footprint]:
        """What it holds on each of its devices; empty until it is loaded."""

    @property
    def limits(self) -> LimitsView | None:
        """What it can take."""

    @property
    def engine(self) -> EngineReport | None:
        """How its engine stands, as the device said last; None before the first request."""

    @property
    def text(self) -> TextView | None:
        """Its text side."""

    @property
    def progress(self) -> Progress | None:
        """How far its load has come."""

    @property
    def failure(self) -> str | None:
        """Why it failed."""

    @property
    def refusal(self) -> Refusal | None:
        """The same as a program reads it, where the load was refused."""

    @property
    def devices(self) -> Sequence[DeviceView]:
        """Where it is, or will be."""

    @property
    def servable(self) -> Servable:
        """What a request would meet."""

    def refuse_unless_loaded(self) -> None:
        """Raise what a request that needs the model now has to be told."""


class TokenStream(Protocol):
    """One running sequence; cancelling its ``__anext__`` loses nothing."""

    def __aiter__(self) -> AsyncIterator[list[TokenRecord]]:
        """Iterate over the batches."""

    async def __anext__(self) -> list[TokenRecord]:
        """Return the next batch; the last record of the last one is a finish."""

    def cancel(self) -> None:
        """End it within one step."""


class Node(Protocol):
    """The supervisor, as far as HTTP goes."""

    @property
    def devices(self) -> Sequence[DeviceView]:
        """In order of their indices."""

    @property
    def models(self) -> Mapping[str, ModelView]:
        """By id."""

    def free_bytes(self, index: int) -> int:
        """Return what of a device's budget no model holds, no load on its way and nobody else."""

    async def load(self, request: LoadRequest) -> ModelView:
        """Queue a load and return; raise Unloadable or LoadedDifferently."""

    async def estimate(self, request: LoadRequest) -> LoadEstimate:
        """Return what a load would take; raise Unloadable for what cannot work here."""

    async def loaded(self, model_id: str) -> ModelView:
        """Wait until a load has ended; raise what it failed with."""

    async def unload(self, model_id: str, force: bool) -> None:
        """Raise ModelNotFound, or Conflict while requests run and it is not forced."""

    async def restart_device(self, index: int, force: bool) -> None:
        """Raise Conflict while it is busy and not forced."""

    async def clear_prefix_cache(self, model_id: str) -> int:
        """Return how many blocks were forgotten; raise what a request for the model meets."""

    def generate(
        self,
        model_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        priority: int = 0,
    ) -> AbstractAsyncContextManager[TokenStream]:
        """Start a sequence, one of higher *priority* first; leaving its context cancels it."""

    async def embed(
        self, model_id: str, token_ids: list[int], pooling: Literal["last", "mean"]
    ) -> bytes:
        """Return one vector, float32 in the host's byte order, of length one; cancellable."""

    async def drain(self, timeout_seconds: float) -> None:
        """Let what runs finish, take nothing new; what still runs in the end fails."""
