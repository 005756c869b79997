"""What a request has cost: tokens, time to first token, rate; read from the answer as it passes.

Of a stream only the chunks up to the first text are parsed, and its tail when it has ended: there
stand the finish, the neuron's comment ``: usage {json}`` and ``[DONE]``. A role chunk or a comment
is no token, so the time to first token is the time to the first text, reasoning or call. Embeddings
have tokens of a prompt only.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
import structlog

from cortex.gateway import sse
from cortex.gateway.errors import STATUS_OF_CODE, Relayed
from cortex.gateway.metrics import UNKNOWN, Metrics
from cortex.ipc.errors import ApiError
from cortex.ipc.openai_answers import Usage

TAIL_BYTES = 16 * 1024
CLIENT_GONE = 499
"""A status for logs only: the client went away before its answer was complete."""

CAUSES = frozenset({*STATUS_OF_CODE, "client_gone"})
"""What may stand in the label; a node may answer with any code."""

log = structlog.get_logger()


SAYS = ("content", "text", "reasoning_content", "tool_calls")
"""What a delta, or a choice of a text completion, says its tokens in."""


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
        self._splitter = sse.EventSplitter()
        self._tail = bytearray()

    def saw(self, chunk: bytes) -> None:
        """Take a piece of a stream."""
        now = time.monotonic()
        if self.first_token_at is None and any(map(_has_text, self._splitter.feed(chunk))):
            self.first_token_at = now
        if b"data: {" in chunk:
            self.last_data_at = now
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
        for choice in data.get("choices") or []:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _take_usage(self, usage: dict[str, Any]) -> None:
        try:
            self.usage = msgspec.convert({"completion_tokens": 0, **usage}, Usage)
        except msgspec.ValidationError:
            log.warning("usage not understood", usage=usage)


def _has_text(event: bytes) -> bool:
    data = sse.data_of(event)
    for choice in (data or {}).get("choices") or []:
        delta = choice.get("delta") or choice
        if any(delta.get(name) for name in SAYS):
            return True
    return False


class RequestRecord:
    """One inference request, for its metrics and its canonical log line."""

    def __init__(self, path: str, key: str | None) -> None:
        self.started_at = time.monotonic()
        self.model = UNKNOWN
        self.node = ""
        self.status = 200
        self.code: str | None = None
        self.meter = Meter()
        self._path = path
        self._key = key

    def failed(self, error: ApiError, status: int) -> None:
        """Note why the client did not get its answer, or not all of it."""
        self.status = status
        self.code = error.code

    def client_gone(self) -> None:
        """Note that the client left."""
        self.status = CLIENT_GONE
        self.code = "client_gone"

    def close(self, metrics: Metrics) -> None:
        """Count it and log it; called once, after the last byte."""
        duration = time.monotonic() - self.started_at
        meter = self.meter
        first = None if meter.first_token_at is None else meter.first_token_at - self.started_at
        self._count(metrics, duration, first)
        log.info(
            "request finished",
            path=self._path,
            model=self.model,
            node=self.node,
            status=self.status,
            code=self.code,
            prompt_tokens=meter.usage.prompt_tokens if meter.usage else None,
            completion_tokens=meter.usage.completion_tokens if meter.usage else None,
            first_token_seconds=None if first is None else round(first, 4),
            duration_seconds=round(duration, 4),
            finish_reason=meter.finish_reason,
            key=self._key,
        )

    def _count(self, metrics: Metrics, duration: float, first: float | None) -> None:
        where = (self.model, self.node)
        metrics.requests.labels(*where).inc()
        metrics.duration.labels(*where).observe(duration)
        if self.code:
            metrics.errors.labels(*where, self.code if self.code in CAUSES else UNKNOWN).inc()
        if first is not None:
            metrics.first_token.labels(*where).observe(first)
        if usage := self.meter.usage:
            metrics.prompt_tokens.labels(*where).inc(usage.prompt_tokens)
            metrics.completion_tokens.labels(*where).inc(usage.completion_tokens)
            cached = usage.prompt_tokens_details
            metrics.cached_prompt_tokens.labels(*where).inc(cached.cached_tokens if cached else 0)
        if rate := self.meter.tokens_per_second():
            metrics.rate.labels(*where).observe(rate)
