"""One inference request, from its body to its last byte.

    body ─► model ─► seats ─► prompt tokens, grammar ─► sampling ─► generations ─► client

Whatever is refused before the generation is an HTTP status. A stream then opens at once, before
anything is computed, so what fails later is an error frame and no ``[DONE]``. Leaving at any point,
also by cancellation because the client left, cancels the generations and gives the seats back. One
choice that fails fails the request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import msgspec
import structlog
from aiohttp import web

from cortex.ipc.errors import ApiError, InternalError
from cortex.ipc.http_body import BODY_PATIENCE_SECONDS, decoded
from cortex.ipc.messages import SamplingParams
from cortex.ipc.node_api import HEADER_USAGE
from cortex.ipc.openai import decode_request
from cortex.ipc.response_body import ResponseBody
from cortex.runtime.access import priority_of
from cortex.runtime.answer import Answer
from cortex.runtime.choices import Choices, generating
from cortex.runtime.conversation import ChatPrompt
from cortex.runtime.door import Door
from cortex.runtime.grammar_check import GrammarCheck
from cortex.runtime.node import LimitsView, ModelView, Node, TextView, TokenStream
from cortex.runtime.prompts import TextThreads, prompts_of
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.sampling import (
    of_choice,
    operator_sampling,
    resolve_sampling,
    room_for_answer,
)
from cortex.runtime.served_model import not_loaded
from cortex.runtime.streaming import (
    DONE,
    HEADERS,
    KEEP_ALIVE_SECONDS,
    READER_PATIENCE_SECONDS,
    EventStream,
)
from cortex.runtime.traffic import Traffics
from cortex.runtime.turn import Asked, Turn, answers_of

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Timing:
    """What a client may feel; tests turn it down."""

    keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    patience_seconds: float = READER_PATIENCE_SECONDS
    body_patience_seconds: float = BODY_PATIENCE_SECONDS
    clock: Callable[[], float] = time.monotonic


class Inference:
    """Serves chat and text completions of a node's models."""

    def __init__(
        self,
        node: Node,
        traffics: Traffics,
        door: Door,
        threads: TextThreads,
        *,
        grammars: GrammarCheck,
        timing: Timing,
    ) -> None:
        self._node = node
        self._traffics = traffics
        self._door = door
        self._threads = threads
        self._grammars = grammars
        self._timing = timing

    async def serve(self, request: web.Request, shape: type[Asked]) -> web.StreamResponse:
        """Answer one request; raise ApiError for what is refused."""
        async with self._door.enter(request) as (record, body):
            asked = await decoded(body, lambda raw: decode_request(raw, shape))
            return await self._answer(request, asked, record)

    async def _answer(
        self, request: web.Request, asked: Asked, record: RequestRecord
    ) -> web.StreamResponse:
        model, text, limits = servable(self._node, asked.model)
        priority = priority_of(request.headers)
        record.model, record.choices = model.id, asked.choices
        traffic = self._traffics.of(model)
        async with traffic.admission.seat(asked.choices, priority):
            prompts = await self._threads.run(lambda: prompts_of(text, asked))
            await self._grammars.refuse_bad(prompts[0].grammar_parts, text)  # the same for all
            record.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
            parts = [_part(asked, model, text, limits, prompt) for prompt in prompts]
            turn = Turn(
                asked,
                [answer for part in parts for answer in part.answers],
                traffic,
                record,
                self._timing.clock,
                reasons=text.reasons,
                grammar_place=prompts[0].grammar_place,
            )

            def start(index: int) -> AbstractAsyncContextManager[TokenStream]:
                at, choice = divmod(index, asked.n or 1)
                sampling = of_choice(parts[at].sampling, choice)
                return self._node.generate(model.id, prompts[at].token_ids, sampling, priority)

            async with generating(asked.choices, start) as choices:
                return await self._respond(request, turn, choices)

    async def _respond(
        self, request: web.Request, turn: Turn, choices: Choices
    ) -> web.StreamResponse:
        if not turn.asked.stream:
            return await self._whole(turn, choices)
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        stream = EventStream(
            ResponseBody(request, response),
            lambda: _cut(request),
            patience_seconds=self._timing.patience_seconds,
            keep_alive_seconds=self._timing.keep_alive_seconds,
        )
        wants_usage_comment = request.headers.get(HEADER_USAGE) == "1"
        await self._stream(stream, turn, choices, wants_usage_comment)
        return response

    async def _whole(self, turn: Turn, choices: Choices) -> web.Response:
        with turn.naming_grammar():
            async for index, records in choices:
                turn.gather(index, records)
                if not turn.running:
                    break
                if turn.is_over(index):
                    choices.cancel(index)
        body = msgspec.json.encode(turn.whole())
        return web.Response(body=body, content_type="application/json")

    async def _stream(
        self, stream: EventStream, turn: Turn, choices: Choices, wants_usage_comment: bool
    ) -> None:
        try:
            for index in range(len(turn.answers)):
                await stream.send(turn.objects.opening(index))
            await self._send_chunks(stream, turn, choices)
            turn.refuse_unfinished()
            if turn.asked.wants_usage_chunk:
                await stream.send(turn.objects.usage(turn.usage))
            if wants_usage_comment:
                await stream.comment("usage", turn.usage)
            await stream.write(DONE)
        except ConnectionResetError:
            turn.record.gone()
        except ApiError as exc:
            await self._send_fault(stream, turn.record, exc)
        except Exception:
            log.exception("stream failed")
            await self._send_fault(stream, turn.record, InternalError("internal error"))

    async def _send_chunks(self, stream: EventStream, turn: Turn, choices: Choices) -> None:
        """Send the pieces as they form."""
        with turn.naming_grammar():
            async for index, records in stream.never_silent(choices):
                for chunk in turn.chunks(index, records):
                    await stream.send(chunk)
                if not turn.running:
                    return
                if turn.is_over(index):
                    choices.cancel(index)

    async def _send_fault(
        self, stream: EventStream, record: RequestRecord, error: ApiError
    ) -> None:
        """End a stream that cannot go on: one frame, and no [DONE]."""
        record.refused(error)
        with contextlib.suppress(ConnectionResetError):  # then nobody is there to be told
            await stream.send(error.body())


@dataclass(frozen=True, slots=True)
class _Part:
    """What becomes of one prompt: how its first choice is sampled, and the answers to it."""

    sampling: SamplingParams
    answers: list[Answer]


def _part(
    asked: Asked, model: ModelView, text: TextView, limits: LimitsView, prompt: ChatPrompt
) -> _Part:
    room_tokens = room_for_answer(
        len(prompt.token_ids), limits.max_context_tokens, limits.kv_cache_tokens
    )
    sampling = resolve_sampling(
        asked,
        operator=operator_sampling(model.request),
        model=text,
        room_tokens=room_tokens,
        end_ids=prompt.end_ids,
        reasoning_budget=prompt.reasoning_budget,
        grammar=prompt.grammar,
    )
    return _Part(sampling, answers_of(asked, text, prompt, room_tokens))


def servable(node: Node, model_id: str) -> tuple[ModelView, TextView, LimitsView]:
    """Return a model that answers now; raise what a request for it must be told."""
    model = node.models.get(model_id)
    if model is None:
        raise not_loaded(model_id)
    model.refuse_unless_loaded()
    assert model.text is not None, "a loaded model has a text side"
    assert model.limits is not None, "a loaded model has limits"
    return model, model.text, model.limits


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
