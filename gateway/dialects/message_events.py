"""A node's chat answer as Anthropic's message: whole, or event by event.

    node                          client
    first chunk                   message_start (tokens of the prompt)
    keep-alive comment            ping
    first text                    content_block_start, content_block_delta
    more text                     content_block_delta
    reasoning, a part of a call   ping: this version of the dialect has no blocks for them
    finish, usage comment         -
    [DONE]                        content_block_stop, message_delta (stop_reason, usage),
                                  message_stop
    error frame                   raised; the proxy ends the stream with an error event

A node says ``stop`` for an end token and for a stop string; it tells which string in
``stop_reason``. Without it the stop counts as ``end_turn``.
"""

from __future__ import annotations

import uuid
from typing import Any

import orjson

from cortex.gateway import sse
from cortex.gateway.dialects.anthropic import PING
from cortex.gateway.errors import Relayed
from cortex.ipc.errors import NodeFailed


def usage_of(usage: dict[str, Any]) -> dict[str, Any]:
    """Return a node's usage as Anthropic counts: cached tokens are not among the input tokens."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": max(usage.get("prompt_tokens", 0) - cached, 0),
        "output_tokens": usage.get("completion_tokens", 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "cache_creation": None,
        "inference_geo": None,
        "output_tokens_details": None,
        "server_tool_use": None,
        "service_tier": "standard",
    }


def stop_of(choice: dict[str, Any]) -> tuple[str, str | None]:
    """Return stop_reason and stop_sequence of a finished *choice*."""
    if choice.get("finish_reason") == "length":
        return "max_tokens", None
    sequence = choice.get("stop_reason")
    if isinstance(sequence, str):
        return "stop_sequence", sequence
    return "end_turn", None


def message_of(body: bytes, model: str) -> dict[str, Any]:
    """Return a node's chat completion as a message of *model*, as the client named it.

    Raise NodeFailed where it is none.
    """
    try:
        completion = orjson.loads(body)
        choice = completion["choices"][0]
        text = choice["message"].get("content")
        envelope = _envelope(model, usage_of(completion["usage"]))
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError) as exc:
        raise NodeFailed("the node's answer is not a chat completion") from exc
    reason, sequence = stop_of(choice)
    content = [{"type": "text", "text": text, "citations": None}] if text else []
    return {
        **envelope,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
    }


def _envelope(model: str, usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": usage,
    }


class MessageEvents:
    """Translates one stream; *prompt_tokens* is 0 where it was not to be learnt beforehand."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._model = model
        self._usage: dict[str, Any] = {"prompt_tokens": prompt_tokens}
        self._choice: dict[str, Any] = {}
        self._has_started = False
        self._has_text = False
        self._splitter = sse.EventSplitter()

    def feed(self, chunk: bytes) -> bytes:
        """Return what *chunk* means; raise Relayed where it holds the node's error frame."""
        return b"".join(self._translate(event) for event in self._splitter.feed(chunk))

    def _translate(self, event: bytes) -> bytes:
        if event == sse.DONE:
            return self._end()
        if usage := sse.usage_of(event):
            self._usage = usage
            return b""
        if sse.is_comment(event):
            return PING
        data = sse.data_of(event) or {}
        if isinstance(error := data.get("error"), dict):
            raise Relayed.of(None, error)
        return self._start() + b"".join(map(self._take, data.get("choices") or []))

    def _start(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        message = _envelope(self._model, usage_of(self._usage))
        return sse.event({"type": "message_start", "message": message}, "message_start")

    def _take(self, choice: dict[str, Any]) -> bytes:
        if choice.get("finish_reason"):
            self._choice = choice
        delta = choice.get("delta") or {}
        text = delta.get("content")
        if not text:
            return PING if delta.get("reasoning_content") or delta.get("tool_calls") else b""
        said = b"" if self._has_text else _block_start()
        self._has_text = True
        added = {"type": "text_delta", "text": text}
        data = {"type": "content_block_delta", "index": 0, "delta": added}
        return said + sse.event(data, "content_block_delta")

    def _end(self) -> bytes:
        reason, sequence = stop_of(self._choice)
        said = self._start()
        if self._has_text:
            said += sse.event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {
            "stop_reason": reason,
            "stop_sequence": sequence,
            "stop_details": None,
            "container": None,
        }
        usage = usage_of(self._usage)
        data = {"type": "message_delta", "delta": delta, "usage": usage}
        return said + sse.event(data, "message_delta") + sse.event(_STOP, "message_stop")


_STOP = {"type": "message_stop"}


def _block_start() -> bytes:
    block = {"type": "text", "text": "", "citations": None}
    data = {"type": "content_block_start", "index": 0, "content_block": block}
    return sse.event(data, "content_block_start")
