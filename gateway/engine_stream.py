"""An engine's stream as a neuron would have sent it; pure.

    engine                                       neuron
    CRLF, ``data:`` without a space, names       one line ``data: ...``
    comments (``: ping - ...``)                  the same: they keep a stream alive
    usage, before or after the finish            ``: usage {json}``, right before ``[DONE]``
    the chunk of it, without choices             nothing, unless the client has asked for it
    an error, of whatever shape                  ``data: {"error": {...}}``, and nothing after it
    a finish, and no ``[DONE]``                  ``[DONE]``
    ``[DONE]``, and no finish                    an error: llama-cpp-python's server says so when it
                                                 drops what it answers for another request

Choices pass as they are, to the byte; where they are going to be translated, as
``engine_choices.py`` has them.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from cortex.gateway import sse
from cortex.gateway.engine_choices import Speech, objects_in
from cortex.gateway.engine_errors import error_in, failure

Json = dict[str, Any]

DETAILS = ("prompt_tokens_details", "completion_tokens_details")


class EngineStream:
    """One stream of the engine *name*."""

    def __init__(self, name: str, *, is_translated: bool, shows_usage: bool) -> None:
        self._name = name
        self._speech = Speech() if is_translated else None
        self._shows_usage = shows_usage
        self._usage: Json | None = None
        self._has_finished = False
        self._is_over = False
        self._splitter = sse.EventSplitter()

    def feed(self, chunk: bytes) -> bytes:
        """Return the whole events that *chunk* completes."""
        return b"".join(self._event(event) for event in self._splitter.feed(chunk))

    def end(self) -> bytes:
        """Return what is left when the engine has ended its answer."""
        said = self.feed(sse.END)
        return said + self._done() if self._has_finished and not self._is_over else said

    def _event(self, event: bytes) -> bytes:
        if self._is_over:
            return b""
        payload, comments = _fields(event)
        said = b"".join(map(self._comment, comments))
        if payload == b"[DONE]":
            return said + self._done()
        return said + self._data(payload) if payload else said

    def _comment(self, text: bytes) -> bytes:
        comment = b": " + text
        if usage := sse.usage_of(comment):  # of another gateway, say
            self._usage = usage_in(usage) or self._usage
            return b""
        return comment + sse.END

    def _data(self, payload: bytes) -> bytes:
        data = _object(payload)
        if data is None:
            return self._fail({"message": "it sent what is no JSON object"})
        if error := error_in(data):
            return self._fail(error)
        choices = objects_in(data.get("choices"))
        self._has_finished |= any(choice.get("finish_reason") for choice in choices)
        if usage := usage_in(data.get("usage")):
            self._usage = usage
            if not choices and not self._shows_usage:
                return b""
        if self._speech is not None:
            payload = orjson.dumps({**data, "choices": list(map(self._speech.said, choices))})
        return sse.DATA + payload.replace(b"\n", b" ") + sse.END

    def _fail(self, error: Json) -> bytes:
        self._is_over = True
        return sse.event(failure(self._name, error).body())

    def _done(self) -> bytes:
        if not self._has_finished:
            return self._fail({"message": "it ended its answer before that was finished"})
        self._is_over = True
        usage = sse.USAGE + orjson.dumps(self._usage) + sse.END if self._usage else b""
        return usage + sse.DONE + sse.END


def _object(payload: bytes) -> Json | None:
    try:
        data = orjson.loads(payload)
    except orjson.JSONDecodeError:
        try:
            data = json.loads(payload)  # takes the NaN that engines in Python write
        except ValueError:
            return None
    return data if isinstance(data, dict) else None


def usage_in(usage: Any) -> Json | None:
    """Return *usage* with what a neuron's has at least, or None where it is none."""
    if not isinstance(usage, dict) or not isinstance(prompt := usage.get("prompt_tokens"), int):
        return None
    told = usage.get("completion_tokens")
    completion = told if isinstance(told, int) else 0
    details = {
        kind: {name: count for name, count in usage[kind].items() if isinstance(count, int)}
        for kind in DETAILS
        if isinstance(usage.get(kind), dict)
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **details,
    }


def _fields(event: bytes) -> tuple[bytes, list[bytes]]:
    """Return the data of *event*, which may be in several lines, and its comments."""
    if event.startswith(b"{"):  # an answer of one object where a stream was asked for
        return event, []
    data, comments = [], []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"error":  # llama-server's, until late 2025
            data.append(b'{"error":' + value + b"}")
        elif not name and line:
            comments.append(value)
    return b"\n".join(data), comments
