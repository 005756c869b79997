"""One inference request, from its body to its last byte.

    body ─► model ─► seat ─► prompt tokens (thread pool) ─► sampling ─► generation ─► text ─► client

Whatever is refused before the generation is an HTTP status. A stream then opens at once, before
anything is computed, so what fails later is an error frame and no ``[DONE]``. Leaving at any point,
also by cancellation because the client left, cancels the generation and gives the seat back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import structlog
from aiohttp import web

from cortex.ipc.errors import ApiError, InternalError, InvalidRequest
from cortex.ipc.node_api import HEADER_USAGE
from cortex.ipc.openai import (
    ChatCompletionRequest,
    decode_request,
)
from cortex.ipc.taps import Tap
from cortex.runtime.admission import shutting_down
from cortex.runtime.completions import Answer
from cortex.runtime.detokenizer import StopStrings
from cortex.runtime.metrics import Metrics
from cortex.runtime.middlewares import REQUEST_ID, as_api_error
from cortex.runtime.node import LimitsView, ModelView, Node, TextView, TokenStream
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.sampling import operator_sampling, resolve_sampling, room_for_answer
from cortex.runtime.served_model import not_loaded
from cortex.runtime.streaming import (
    DONE,
    HEADERS,
    KEEP_ALIVE,
    KEEP_ALIVE_SECONDS,
    READER_PATIENCE_SECONDS,
    EventStream,
    batches_and_silences,
)
from cortex.runtime.traffic import TokensHeld, Traffics
from cortex.runtime.turn import Asked, Turn

T = TypeVar("T")

TEXT_THREADS = 4

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Timing:
    """What a client may feel; tests turn it down."""

    keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    patience_seconds: float = READER_PATIENCE_SECONDS
    clock: Callable[[], float] = time.monotonic


class Inference:
    """Serves chat and text completions of a node's models."""

    def __init__(
        self,
        node: Node,
        traffics: Traffics,
        metrics: Metrics,
        *,
        tap: Tap,
        timing: Timing,
    ) -> None:
        self.is_draining = False
        self._node = node
        self._traffics = traffics
        self._metrics = metrics
        self._tap = tap
        self._timing = timing
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Give up the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def refuse_new(self) -> None:
        """Answer 503 ``shutting_down`` from now on, also to who waits for a seat."""
        self.is_draining = True
        self._traffics.close()

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        await self._idle.wait()

    async def serve(self, request: web.Request, shape: type[Asked]) -> web.StreamResponse:
        """Answer one request; raise ApiError for what is refused."""
        with self._recorded(request) as record:
            if self.is_draining:
                raise shutting_down()
            body = await request.read()
            with self._running():  # only now: a body that never ends must not hold up a drain
                return await self._answer(request, decode_request(body, shape), record)

    async def _answer(
        self, request: web.Request, asked: Asked, record: RequestRecord
    ) -> web.StreamResponse:
        model, text, limits = servable(self._node, asked.model)
        record.model = model.id
        traffic = self._traffics.of(model)
        async with traffic.admission.seat():
            prompt = await self.in_thread(lambda: prompt_of(text, asked))
            record.prompt_tokens = len(prompt)
            sampling = resolve_sampling(
                asked,
                operator=operator_sampling(model.request),
                model=text.generation,
                stop_token_ids=text.stop_token_ids,
                room_tokens=room_for_answer(
                    len(prompt), limits.max_context_tokens, limits.kv_cache_tokens
                ),
            )
            answer = Answer(text.detokenizer(), StopStrings(asked.stop_strings))
            turn = Turn(asked, answer, traffic, record, self._timing.clock)
            async with self._node.generate(model.id, prompt, sampling) as generation:
                return await self._respond(request, turn, generation)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run *work*, which blocks, in one of few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _respond(
        self, request: web.Request, turn: Turn, generation: TokenStream
    ) -> web.StreamResponse:
        with turn.traffic.holding(turn.record.prompt_tokens) as held:
            if not turn.asked.stream:
                return await self._whole(turn, generation, held)
            response = web.StreamResponse(headers=HEADERS)
            await response.prepare(request)
            stream = EventStream(response, lambda: _cut(request), self._timing.patience_seconds)
            wants_usage_comment = request.headers.get(HEADER_USAGE) == "1"
            await self._stream(stream, turn, generation, held, wants_usage_comment)
            return response

    async def _whole(self, turn: Turn, generation: TokenStream, held: TokensHeld) -> web.Response:
        pieces: list[str] = []
        async for records in generation:
            pieces.append(turn.add(records, held))
            if turn.answer.finish_reason is not None:
                break
        whole = turn.answers.whole(
            "".join(pieces), turn.reason(), turn.answer.stop_string, turn.usage
        )
        return web.Response(body=msgspec.json.encode(whole), content_type="application/json")

    async def _stream(
        self,
        stream: EventStream,
        turn: Turn,
        generation: TokenStream,
        held: TokensHeld,
        wants_usage_comment: bool,
    ) -> None:
        try:
            await stream.send(turn.answers.opening())
            await self._send_pieces(stream, turn, generation, held)
            await stream.send(turn.answers.ending(turn.reason(), turn.answer.stop_string))
            if turn.asked.wants_usage_chunk:
                await stream.send(turn.answers.usage(turn.usage))
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

    async def _send_pieces(
        self, stream: EventStream, turn: Turn, generation: TokenStream, held: TokensHeld
    ) -> None:
        """Send the text as it finishes, and a comment where there is none for too long."""
        keep_alive_seconds = self._timing.keep_alive_seconds
        silences = batches_and_silences(
            generation, lambda: keep_alive_seconds - stream.silent_seconds
        )
        async with contextlib.aclosing(silences) as batches:
            async for records in batches:
                text = turn.add(records, held) if records else ""
                if text:
                    await stream.send(turn.answers.piece(text))
                elif stream.silent_seconds >= keep_alive_seconds:
                    await stream.write(KEEP_ALIVE)
                if turn.answer.finish_reason is not None:
                    return

    async def _send_fault(
        self, stream: EventStream, record: RequestRecord, error: ApiError
    ) -> None:
        """End a stream that cannot go on: one frame, and no [DONE]."""
        record.refused(error)
        with contextlib.suppress(ConnectionResetError):  # then nobody is there to be told
            await stream.send(error.body())

    @contextlib.contextmanager
    def _recorded(self, request: web.Request) -> Iterator[RequestRecord]:
        """Log, measure and publish the request when it ends, however it does."""
        record = RequestRecord(request[REQUEST_ID], arrived=self._timing.clock())
        try:
            yield record
        except ApiError as exc:
            record.refused(exc)
            raise
        except (asyncio.CancelledError, ConnectionResetError):
            record.gone()
            raise
        except BaseException as exc:
            record.refused(as_api_error(exc))
            raise
        finally:
            record.duration_seconds = self._timing.clock() - record.arrived
            self._ended(record)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Be waited for by ``idle``."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _ended(self, record: RequestRecord) -> None:
        fields = record.fields()
        log.info("request finished", **fields)
        self._tap.publish("request", fields)
        if record.model is not None:
            self._metrics.count(
                record.model,
                status=record.status,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                first_token_seconds=record.first_token_seconds,
                duration_seconds=record.duration_seconds,
                finish_reason=record.finish_reason,
            )


def servable(node: Node, model_id: str) -> tuple[ModelView, TextView, LimitsView]:
    """Return a model that answers now; raise what a request for it must be told."""
    model = node.models.get(model_id)
    if model is None:
        raise not_loaded(model_id)
    model.refuse_unless_loaded()
    assert model.text is not None, "a loaded model has a text side"
    assert model.limits is not None, "a loaded model has limits"
    return model, model.text, model.limits


def prompt_of(text: TextView, asked: Asked) -> list[int]:
    """Return the prompt's tokens; blocks. Raise ApiError in words."""
    if isinstance(asked, ChatCompletionRequest):
        return text.chat_prompt(asked.messages, asked.chat_template_kwargs)
    if isinstance(asked.prompt, str):
        prompt = text.text_prompt(asked.prompt)
    else:
        prompt = [token for token in asked.prompt if isinstance(token, int)]  # all are, by now
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if max(prompt) >= text.vocab_size:
        raise InvalidRequest(
            f"the prompt has the token id {max(prompt)}, and the model's end at "
            f"{text.vocab_size - 1}",
            param="prompt",
        )
    return prompt


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
