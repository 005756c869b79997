"""``/v1/embeddings``: one vector per input, of models that declare how they make one.

    inputs ─► tokens (thread pool) ─► all refused, or none ─► vectors, a few at a time ─► answer

A request takes one seat, however many inputs it has; leaving cancels what runs. ``dimensions`` cuts
the vectors and makes them of length one again, as models trained for it expect (Matryoshka
representations, arXiv:2205.13147).
"""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from array import array
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from aiohttp import web

from cortex.ipc.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    PromptTooLongForMemory,
    UnsupportedParameter,
)
from cortex.ipc.http_body import decoded
from cortex.ipc.openai import EmbeddingRequest, decode_request
from cortex.ipc.openai_answers import Embedding, EmbeddingList, EmbeddingUsage
from cortex.runtime.access import priority_of
from cortex.runtime.door import Door
from cortex.runtime.inference import servable
from cortex.runtime.node import LimitsView, Node, TextView
from cortex.runtime.prompts import TextThreads, tokens_of
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.traffic import Traffics

AT_ONCE = 8
"""Inputs of one request that a device works on; more would only wait there."""


class Embeddings:
    """Serves embeddings of a node's models."""

    def __init__(self, node: Node, traffics: Traffics, door: Door, threads: TextThreads) -> None:
        self._node = node
        self._traffics = traffics
        self._door = door
        self._threads = threads

    async def serve(self, request: web.Request) -> web.Response:
        """Answer one request; raise ApiError for what is refused."""
        async with self._door.enter(request) as (record, body):
            asked = await decoded(body, lambda raw: decode_request(raw, EmbeddingRequest))
            return await self._answer(asked, record, priority_of(request.headers))

    async def _answer(
        self, asked: EmbeddingRequest, record: RequestRecord, priority: int
    ) -> web.Response:
        model, text, limits = servable(self._node, asked.model)
        record.model = model.id
        pooling = pooling_of(text, model.id)
        traffic = self._traffics.of(model)
        async with traffic.admission.seat(priority=priority):
            inputs = await self._threads.run(lambda: tokens_of_inputs(text, asked, limits))
            record.prompt_tokens = sum(map(len, inputs))
            vectors = await gathered(
                inputs, lambda token_ids: self._node.embed(model.id, token_ids, pooling)
            )
            answer = await self._threads.run(
                lambda: answer_of(asked, vectors, record.prompt_tokens)
            )
        return web.Response(body=answer, content_type="application/json")


def pooling_of(text: TextView, model_id: str) -> Literal["last", "mean"]:
    """Return how the model makes a vector; raise UnsupportedParameter where it does not say."""
    if text.pooling is None:
        raise UnsupportedParameter(
            f"model {model_id!r} makes no embeddings: its checkpoint does not say how",
            param="model",
        )
    return text.pooling


def tokens_of_inputs(
    text: TextView, asked: EmbeddingRequest, limits: LimitsView
) -> list[list[int]]:
    """Return the tokens of every input; blocks.

    Raise InvalidRequest, or what ``refuse_too_long`` does; all name the input.
    """
    inputs = asked.inputs
    found: list[list[int]] = []
    for index, given in enumerate(inputs):
        place = "input" if len(inputs) == 1 else f"input[{index}]"
        tokens = tokens_of(text, given, place)
        refuse_too_long(len(tokens), place, limits)
        found.append(tokens)
    return found


def refuse_too_long(tokens: int, place: str, limits: LimitsView) -> None:
    """Raise ContextLengthExceeded, or PromptTooLongForMemory where only the context is enough."""
    if tokens > limits.max_context_tokens:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limits.max_context_tokens} tokens. "
            f"However, {place} resulted in {tokens} tokens.",
            param=place,
            extras={"prompt_tokens": tokens, "maximum_tokens": limits.max_context_tokens},
        )
    if tokens > limits.kv_cache_tokens:
        raise PromptTooLongForMemory(
            f"{place} has {tokens} tokens, and the KV cache holds {limits.kv_cache_tokens}",
            param=place,
            extras={"prompt_tokens": tokens, "cache_tokens": limits.kv_cache_tokens},
        )


async def gathered(
    inputs: list[list[int]], embed: Callable[[list[int]], Awaitable[bytes]]
) -> list[bytes]:
    """Return the vector of each of *inputs*; the first that fails ends the others.

    Raise what it raises.
    """
    vectors = [b""] * len(inputs)
    waiting = iter(enumerate(inputs))

    async def work() -> None:
        for index, token_ids in waiting:
            vectors[index] = await embed(token_ids)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(AT_ONCE, len(inputs))):
                tasks.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one is enough to tell
    return vectors


def answer_of(asked: EmbeddingRequest, vectors: list[bytes], prompt_tokens: int) -> bytes:
    """Return the answer as JSON; blocks. Raise InvalidRequest for more dimensions than there are.

    Vectors are float32 in the byte order of this host.
    """
    size = len(vectors[0]) // 4
    if (asked.dimensions or 0) > size:
        raise InvalidRequest(
            f"the model's vectors have {size} dimensions, not {asked.dimensions}",
            param="dimensions",
        )
    data = [
        Embedding(index, _written(_cut(vector, asked.dimensions), asked.encoding_format))
        for index, vector in enumerate(vectors)
    ]
    usage = EmbeddingUsage(prompt_tokens, prompt_tokens)
    return msgspec.json.encode(EmbeddingList(data, asked.model, usage))


def _cut(vector: bytes, dimensions: int | None) -> array[float]:
    """Return the first *dimensions* numbers, of length one again; all where it is None."""
    numbers = array("f", vector)
    if dimensions is None or dimensions == len(numbers):
        return numbers
    numbers = numbers[:dimensions]
    length = math.hypot(*numbers)
    return array("f", (number / length for number in numbers)) if length else numbers


def _written(numbers: array[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return numbers.tolist()
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
