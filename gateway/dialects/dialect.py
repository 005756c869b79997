"""What every dialect must be able to say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from cortex.ipc.errors import ApiError

AskNode = Callable[[str, bytes], Awaitable[bytes]]
"""POST a body to a path of the node that serves the request; return its answer's body."""


class Dialect(Protocol):
    """The envelopes of an API."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status of *error*."""

    def envelope(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """Return the body of *error*."""

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the event that ends a stream whose status is spent."""

    def keep_alive(self, text: str) -> bytes:
        """Return what keeps a waiting stream alive without being part of the answer."""


class Translation(Protocol):
    """A node's stream, event by event, in the client's dialect."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what *chunk* means to the client; raise ApiError where it ends the stream."""


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

    def body(self, node_id: str) -> bytes:
        """Return the body for a node that calls the model *node_id*."""

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return the client's form of a node's whole answer; raise NodeFailed if it has none."""

    async def translation(self, node_id: str, ask: AskNode) -> Translation:
        """Return what will translate the stream; *ask* asks the same node."""
