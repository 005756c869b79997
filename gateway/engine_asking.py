"""Asks an engine as if it were a neuron: whoever is answered does not see the difference.

    the request     the same body, but for ``stream_options.include_usage``, without which a stream
                    does not tell what it has cost; no header of ours: ids of keys are not its to
                    know, and vLLM takes two requests with one ``x-request-id`` for the same
    its silence     a keep-alive after every time of it, also before its first byte: engines say
                    nothing while they compute a prompt
    its stream      ``engine_stream.py``
    its answer      the same to the byte, unless it is going to be translated

What is no answer, a page of some proxy in between say, is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import orjson
from msgspec import UNSET

from cortex.gateway import sse
from cortex.gateway.background import Background
from cortex.gateway.dialects.dialect import Call
from cortex.gateway.engine_choices import Speech, objects_in
from cortex.gateway.engine_errors import error_in, failure
from cortex.gateway.engine_stream import EngineStream, usage_in
from cortex.gateway.fleet import Node
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import ApiError, NodeFailed
from cortex.ipc.http_body import decoded
from cortex.ipc.requests import decode_object

Json = dict[str, Any]

NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
ASKED = b'"stream_options":{"include_usage":true},'


class StreamOptions(msgspec.Struct):
    """What of a body is read before it is sent."""

    stream_options: Any = UNSET

    @property
    def include_usage(self) -> bool:
        """Whether the client has asked what its stream costs."""
        options = self.stream_options
        return isinstance(options, dict) and options.get("include_usage") is True


@asynccontextmanager
async def ask_engine(
    client: NodeClient, node: Node, call: Call, body: bytes, keep_alive_seconds: float
) -> AsyncIterator[EngineAnswer]:
    """POST *body* of *call*, as ``NodeClient.ask`` does with a neuron.

    What that raises is raised when the answer is read.
    """
    how = _events if call.wants_stream else _body
    async with aclosing(how(client, node, call, body)) as chunks, Background() as beside:
        yield EngineAnswer(node, chunks, beside, keep_alive_seconds)


async def _events(
    client: NodeClient, node: Node, call: Call, body: bytes
) -> AsyncGenerator[bytes, None]:
    """Yield the stream, in pieces of whole events."""
    body, shows_usage = with_usage(body)
    stream = EngineStream(node.name, is_translated=call.is_translated, shows_usage=shows_usage)
    async with client.ask(node, call.path, body, {}) as answer:
        while chunk := await answer.next_chunk():
            if said := stream.feed(chunk):
                yield said
    if said := stream.end():
        yield said


async def _body(
    client: NodeClient, node: Node, call: Call, body: bytes
) -> AsyncGenerator[bytes, None]:
    """Yield the whole answer; raise NodeFailed where it is none."""

    def taken(body: bytes) -> bytes:
        return whole(node.name, body, is_translated=call.is_translated)

    async with client.ask(node, call.path, body, {}) as answer:
        yield await decoded(await answer.read(), taken)


class EngineAnswer:
    """An answer in chunks of whole events, and of keep-alives where none comes for a while."""

    def __init__(
        self,
        node: Node,
        chunks: AsyncGenerator[bytes, None],
        beside: Background,
        keep_alive_seconds: float,
    ) -> None:
        self.node = node
        self._chunks = chunks
        self._beside = beside
        self._keep_alive_seconds = keep_alive_seconds
        self._coming: asyncio.Task[bytes | ApiError] | None = None

    async def next_chunk(self) -> bytes:
        """Return what has come, or ``sse.KEEP_ALIVE``; nothing at the end."""
        if self._coming is None:
            self._coming = self._beside.task(self._next(), "next chunk")
        done, _ = await asyncio.wait({self._coming}, timeout=self._keep_alive_seconds)
        if not done:
            return sse.KEEP_ALIVE
        came, self._coming = self._coming.result(), None
        if isinstance(came, ApiError):
            raise came
        return came

    async def read(self) -> bytes:
        """Return all of it."""
        return b"".join([chunk async for chunk in self._chunks])

    async def _next(self) -> bytes | ApiError:
        try:
            return await anext(self._chunks, b"")
        except ApiError as error:  # the task's own failure would end the whole block
            return error


def with_usage(body: bytes) -> tuple[bytes, bool]:
    """Return *body* so that its stream tells what it has cost, and whether it did so already.

    What is no object that can be read is the engine's to refuse.
    """
    try:
        fields = msgspec.json.decode(body, type=StreamOptions)
    except msgspec.DecodeError:
        return body, False
    if fields.include_usage:
        return body, True
    options = fields.stream_options
    if options is UNSET:
        begin = body.index(b"{") + 1
        return body[:begin] + ASKED + body[begin:], False
    if options is not None and not isinstance(options, dict):
        return body, False
    asked = {**(options or {}), "include_usage": True}
    return msgspec.json.encode({**decode_object(body), "stream_options": asked}), False


class Answered(msgspec.Struct):
    """What of a whole answer tells whether it is one; vectors, say, are skipped."""

    error: Any = None
    object: Any = None
    message: Any = None
    code: Any = None


def whole(name: str, body: bytes, *, is_translated: bool) -> bytes:
    """Return the answer *body* of the engine *name*; raise NodeFailed where it is none."""
    try:
        answer = msgspec.structs.asdict(msgspec.json.decode(body, type=Answered))
    except msgspec.DecodeError as exc:
        raise NodeFailed(f"node {name} did not answer with a JSON object") from exc
    if error := error_in(answer):
        raise failure(name, error)
    if not is_translated:
        return body
    data = orjson.loads(body)
    said = [Speech().said(choice) for choice in objects_in(data.get("choices"))]
    return orjson.dumps({**data, "choices": said, "usage": usage_in(data.get("usage")) or NO_USAGE})
