"""A node's chat stream, read event by event; what each means is for a dialect to say.

    node                              dialect
    first chunk                       ``_begin``, which may be asked more than once
    keep-alive comment                ``_still``
    reasoning, text                   ``_think``, ``_say``
    parts of calls                    ``_call``, one call after the other (``call_order.py``)
    finish, usage                     nothing yet: kept for the end
    [DONE]                            ``_end``
    error frame                       nothing: it is in ``error``, and nothing follows

What an engine says comes here as a neuron would have said it (``engine_stream.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from cortex.gateway import sse
from cortex.gateway.dialects.call_order import CallOrder
from cortex.gateway.errors import Relayed
from cortex.ipc.errors import ApiError

Json = dict[str, Any]


class ChatEvents(ABC):
    """Translates one stream."""

    def __init__(self, usage: Json) -> None:
        self.error: ApiError | None = None
        """What has ended the stream; the client has yet to hear of it."""
        self._usage = usage
        self._choice: Json = {}
        """The last one, with why it finished."""
        self._calls = CallOrder()
        self._is_over = False
        self._splitter = sse.EventSplitter()

    def feed(self, chunk: bytes) -> bytes:
        """Return what *chunk* means."""
        said: list[bytes] = []
        try:
            said.extend(map(self._translate, self._splitter.feed(chunk)))
        except ApiError as error:  # what was said before it is not lost
            self.error, self._is_over = error, True
        return b"".join(said)

    def _translate(self, event: bytes) -> bytes:
        """Return what *event* means; raise ApiError where it ends the stream."""
        if self._is_over:
            return b""
        if event == sse.DONE:
            self._is_over = True
            return self._begin() + self._all(self._calls.rest()) + self._end()
        if usage := sse.usage_of(event):
            self._usage = usage
            return b""
        if sse.is_comment(event):
            return self._still()
        data = sse.data_of(event) or {}
        if isinstance(error := data.get("error"), dict):
            raise Relayed.of(None, error)
        self._usage = data.get("usage") or self._usage
        return self._begin() + b"".join(map(self._take, data.get("choices") or []))

    def _take(self, choice: Json) -> bytes:
        if choice.get("finish_reason"):
            self._choice = choice
        delta = choice.get("delta") or {}
        reasoning, text = delta.get("reasoning_content"), delta.get("content")
        said = self._all(self._calls.rest()) if reasoning or text else b""
        if reasoning:
            said += self._think(reasoning)
        if text:
            said += self._say(text, choice)
        return said + self._all(self._calls.take(delta.get("tool_calls") or []))

    def _all(self, parts: list[Json]) -> bytes:
        return b"".join(map(self._call, parts))

    @abstractmethod
    def _begin(self) -> bytes:
        """Return what comes before everything else, unless that has been said."""

    @abstractmethod
    def _still(self) -> bytes:
        """Return what says that there is more to come."""

    @abstractmethod
    def _think(self, reasoning: str) -> bytes:
        """Return what tells more of the *reasoning*."""

    @abstractmethod
    def _say(self, text: str, choice: Json) -> bytes:
        """Return what tells more of the *text*, which has come in *choice*."""

    @abstractmethod
    def _call(self, part: Json) -> bytes:
        """Return what tells of the next *part* of a call."""

    @abstractmethod
    def _end(self) -> bytes:
        """Return what comes last."""
