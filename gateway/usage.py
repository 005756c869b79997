"""What a request has cost: tokens, time to first token, rate; read from the answer as it passes.

Of a stream only the chunks up to the first text are parsed, and its tail when it has ended: there
stand the finish, the neuron's comment ``: usage {json}`` and ``[DONE]``. A role chunk or a comment
is no token, so the time to first token is the time to the first text, reasoning or call. Embeddings
have tokens of a prompt only. All dialects are read alike: before translation, as the node says it.
"""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

import msgspec
import structlog
from msgspec import Meta

from cortex.gateway import sse
from cortex.gateway.budgets import Reservation, prompt_estimate
from cortex.gateway.errors import STATUS_OF_CODE, Relayed
from cortex.gateway.ledger import Ledger, cached_tokens
from cortex.gateway.metrics import UNKNOWN, Metrics
from cortex.ipc.errors import ApiError
from cortex.ipc.openai_answers import PromptTokensDetails, Usage

TAIL_BYTES = 16 * 1024
CLIENT_GONE = 499
"""A status for logs only: the client went away before its answer was complete."""

TURNED_AWAY = frozenset({429, 503})
"""Statuses of those for whom there was no room, no budget or no model now."""

CAUSES = frozenset({*STATUS_OF_CODE, "client_gone"})
"""What may stand in the label; a node may answer with any code."""

log = structlog.get_logger()


def cause_of(code: str) -> str:
    """Return *code* as a label."""
    return code if code in CAUSES else UNKNOWN


SAYS = ("content", "text", "reasoning_content", "reasoning", "tool_calls")
"""What a delta, or a choice of a text completion, says its tokens in."""


MAX_TOKENS = 2**40
"""Of one request; more is nonsense, and its sums would be no integers of SQLite's."""
Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class ToldDetails(msgspec.Struct):
    """Of ``prompt_tokens_details`` what is counted; others than neurons may leave it out."""

    cached_tokens: Tokens | None = None


class ToldUsage(msgspec.Struct):
    """``usage`` as little of it as is counted; embeddings have no completion."""

    prompt_tokens: Tokens
    completion_tokens: Tokens | None = None
    prompt_tokens_details: ToldDetails | None = None

    def counted(self) -> Usage:
        """Return it in the shape that everybody reads."""
        prompt, completion = self.prompt_tokens, self.completion_tokens or 0
        details = self.prompt_tokens_details
        cached = PromptTokensDetails(details.cached_tokens or 0) if details else None
        return Usage(prompt, completion, prompt + completion, cached)


class Measured(msgspec.Struct):
    """What is measured of a whole answer; vectors, say, are skipped and never made."""

    choices: Any = None
    usage: Any = None
    error: Any = None

    def fields(self) -> dict[str, Any]:
        """Return it as the object of an event."""
        return msgspec.structs.asdict(self)


class Meter:
    """Watches one answer of a node."""

    def __init__(self) -> None:
        self.first_token_at: float | None = None
        self.last_data_at: float | None = None
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.error: ApiError | None = None
        self.is_complete = False
        self.chunks_of_text = 0
        """Those with data that came from the first text on: about as many as tokens."""
        self._splitter = sse.EventSplitter()
        self._tail = bytearray()

    def saw(self, chunk: bytes) -> None:
        """Take a piece of a stream."""
        now = time.monotonic()
        if self.first_token_at is None and any(map(_has_text, self._splitter.feed(chunk))):
            self.first_token_at = now
        if chunks := chunk.count(b"data: {"):
            self.last_data_at = now
            self.chunks_of_text += chunks if self.first_token_at is not None else 0
        self._tail += chunk
        if len(self._tail) > 2 * TAIL_BYTES:  # now and then: not a copy of it for each token
            del self._tail[:-TAIL_BYTES]

    def ended(self) -> None:
        """Read the tail of a stream that has ended."""
        tail = bytes(self._tail[-TAIL_BYTES:])
        for event in tail.replace(b"\r\n", b"\n").split(sse.END):
            if usage := sse.usage_of(event):
                self._take_usage(usage)
            elif event == sse.DONE:
                self.is_complete = True
            elif data := sse.data_of(event):
                self._take(data)

    def saw_answer(self, body: bytes) -> None:
        """Take an answer that came whole; of what it says only what is measured is read."""
        self.is_complete = True
        with contextlib.suppress(msgspec.DecodeError):  # no object, so it has nothing to measure
            self._take(msgspec.json.decode(body, type=Measured).fields())

    def tokens_per_second(self) -> float | None:
        """Return the rate after the first token, or None where one cannot be told."""
        if self.usage is None or self.first_token_at is None or self.last_data_at is None:
            return None
        seconds = self.last_data_at - self.first_token_at
        tokens = self.usage.completion_tokens - 1
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def _take(self, data: dict[str, Any]) -> None:
        if isinstance(error := data.get("error"), dict):
            self.error = Relayed.of(None, error)
        if isinstance(usage := data.get("usage"), dict):
            self._take_usage(usage)
        for choice in _choices(data):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _take_usage(self, usage: dict[str, Any]) -> None:
        try:
            self.usage = msgspec.convert(usage, ToldUsage).counted()
        except msgspec.ValidationError:
            log.warning("usage not understood", usage=usage)


def _has_text(event: bytes) -> bool:
    for choice in _choices(sse.data_of(event) or {}):
        delta = choice.get("delta") or choice
        if any(delta.get(name) for name in SAYS):
            return True
    return False


def _choices(data: dict[str, Any]) -> list[dict[str, Any]]:
    choices = data.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []


class RequestRecord:
    """One inference request, for its metrics, its row in the ledger and its canonical log line."""

    def __init__(self, path: str, key: str | None) -> None:
        self.started_at = time.monotonic()
        self.model = UNKNOWN
        self.node = ""
        self.reason: str | None = None
        self.status = 200
        self.code: str | None = None
        self.body_bytes = 0
        """Of what the node that is asked was sent; 0: none is."""
        self.reservation: Reservation | None = None
        self.queue_seconds: float | None = None
        self.retries = 0
        self.meter = Meter()
        self._path = path
        self._key = key
        self._is_turned_away = False

    def asked(self, node: str, reason: str) -> None:
        """Note that *node* is asked now, and why this one."""
        self.node, self.reason = node, reason
        if self.queue_seconds is None:
            self.queue_seconds = time.monotonic() - self.started_at
        else:
            self.retries += 1

    def node_failed(self) -> None:
        """Note that the node that was asked computes nothing, so that it costs nothing."""
        self.body_bytes = 0

    def failed(self, error: ApiError, status: int) -> None:
        """Note why the client did not get its answer, or not all of it."""
        self.status = status
        self.code = error.code
        self._is_turned_away = error.status in TURNED_AWAY

    def client_gone(self) -> None:
        """Note that the client left."""
        self.status = CLIENT_GONE
        self.code = "client_gone"
        self.meter.ended()  # it may have left after the usage had come

    def usage(self) -> Usage | None:
        """Return what it has cost, as its node said, or None.

        No node can say what a client cost that left before its answer was complete, and there are
        engines that never do: then it is the chunks that have come, and the prompt's estimate.
        Whoever leaves before a node is asked costs nothing.
        """
        is_gone = self.code == "client_gone" and self.body_bytes > 0
        has_text = self.code in (None, "client_gone") and self.meter.chunks_of_text > 0
        if self.meter.usage is None and (is_gone or has_text):
            prompt, completion = prompt_estimate(self.body_bytes), self.meter.chunks_of_text
            return Usage(prompt, completion, prompt + completion)
        return self.meter.usage

    def close(self, metrics: Metrics, ledger: Ledger) -> None:
        """Count it, settle it and log it; called once, after the last byte."""
        duration = time.monotonic() - self.started_at
        first = self.meter.first_token_at
        first_seconds = None if first is None else first - self.started_at
        usage = self.usage()
        if self.reservation:
            self.reservation.settle(usage.prompt_tokens + usage.completion_tokens if usage else 0)
        self._count(metrics, duration, first_seconds)
        if usage:
            ledger.count(self._key, self.model, usage)
            self._count_tokens(metrics, usage)
        log.info(
            "request finished",
            path=self._path,
            model=self.model,
            node=self.node,
            reason=self.reason,
            status=self.status,
            code=self.code,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=cached_tokens(usage) if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            queue_seconds=_rounded(self.queue_seconds),
            first_token_seconds=_rounded(first_seconds),
            duration_seconds=_rounded(duration),
            finish_reason=self.meter.finish_reason,
            retries=self.retries,
            key=self._key,
        )

    def _count(self, metrics: Metrics, duration: float, first: float | None) -> None:
        where = (self.model, self.node)
        metrics.counter(metrics.requests, *where).inc()
        metrics.histogram(metrics.duration, *where).observe(duration)
        if self.code:
            metrics.errors.labels(*where, cause_of(self.code)).inc()
            if self._is_turned_away:
                metrics.rejections.labels(self.model, cause_of(self.code)).inc()
        if self.queue_seconds is not None:
            metrics.histogram(metrics.queue, *where).observe(self.queue_seconds)
        if first is not None:
            metrics.histogram(metrics.first_token, *where).observe(first)
        if rate := self.meter.tokens_per_second():
            metrics.histogram(metrics.rate, *where).observe(rate)

    def _count_tokens(self, metrics: Metrics, usage: Usage) -> None:
        where = (self.model, self.node)
        metrics.counter(metrics.prompt_tokens, *where).inc(usage.prompt_tokens)
        metrics.counter(metrics.completion_tokens, *where).inc(usage.completion_tokens)
        metrics.counter(metrics.cached_prompt_tokens, *where).inc(cached_tokens(usage))
        if self._key:
            metrics.counter(metrics.spend_prompt, self._key).inc(usage.prompt_tokens)
            metrics.counter(metrics.spend_completion, self._key).inc(usage.completion_tokens)
            metrics.counter(metrics.spend, self._key).inc(
                usage.prompt_tokens + usage.completion_tokens
            )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
