"""What every dialect must be able to say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from cortex.ipc.errors import ApiError

CountTokens = Callable[[bytes], Awaitable[int]]
"""Ask the node that serves the request how many tokens the prompt of a chat request has."""


class Dialect(Protocol):
    """The envelopes of an API."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status of *error*."""

    def envelope(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """Return the body of *error*."""


class Translation(Protocol):
    """A node's stream, event by event, in the client's dialect."""

    @property
    def error(self) -> ApiError | None:
        """What of the node's has ended the stream, where the client has yet to hear of it."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what *chunk* means to the client, as far as there is no ``error`` in it."""


class Call(Protocol):
    """One request of a client, as a node will be asked."""

    @property
    def dialect(self) -> Dialect:
        """The dialect it came in."""

    @property
    def model(self) -> str:
        """The model, as the client named it."""

    @property
    def wants_stream(self) -> bool:
        """Whether the answer comes in events."""

    @property
    def path(self) -> str:
        """The path at the node."""

    @property
    def affinity(self) -> str | None:
        """What its session, or the head of its conversation, is known by; None: nothing repeats."""

    @property
    def output_limit(self) -> int | None:
        """Tokens that the answer may have, as the client said; None where it said nothing."""

    @property
    def stay_seconds(self) -> float | None:
        """Ollama's ``keep_alive``: how long the model is to stay after this; infinite: for ever."""

    def keep_alive(self, text: str) -> bytes:
        """Return what keeps its waiting stream alive and, where the dialect can, says *text*."""

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the event that ends its stream, whose status is spent."""

    def refusal(self, error: ApiError) -> ApiError:
        """Return *error* of a node as the client would say it: its places, its words."""

    def body(self, node_id: str) -> bytes:
        """Return the body for a node that calls the model *node_id*."""

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return the client's form of a node's whole answer; raise NodeFailed if it has none."""

    @property
    def is_translated(self) -> bool:
        """Whether the client speaks another dialect than nodes do."""

    async def translation(self, node_id: str, count: CountTokens) -> Translation:
        """Return what will translate the stream; *count* asks the same node."""
