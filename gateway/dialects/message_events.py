"""A node's chat stream as Anthropic's events.

    node                          client
    first chunk                   message_start (tokens of the prompt)
    keep-alive comment            ping
    reasoning                     thinking_delta; where the client wants it omitted, without words
                                  and with how many tokens it was, about
    text                          text_delta
    a call begins                 a new block
    more of its arguments         input_json_delta, as they form
    [DONE]                        message_delta (stop_reason, usage), message_stop
    error frame                   nothing; the proxy ends the stream with an error event

One block is open at a time. What belongs to another one closes it and opens the next:

    content_block_start, content_block_delta ..., content_block_stop     index 0
    content_block_start ...                                              index 1

A block of thinking gets its signature before it is closed.
"""

from __future__ import annotations

from typing import Any

from cortex.gateway import sse
from cortex.gateway.dialects.anthropic import PING
from cortex.gateway.dialects.call_order import arguments_of, number_of
from cortex.gateway.dialects.chat_events import ChatEvents
from cortex.gateway.dialects.message_answers import (
    Expected,
    Json,
    stop_of,
    text_block,
    thinking_block,
    tool_use_block,
    usage_of,
)
from cortex.gateway.dialects.message_thinking import signature_of

THINKING, TEXT = "thinking", "text"
CHARACTERS_OF_A_TOKEN = 4
"""Nearly; for a sign of life, and for nothing that is counted."""


class MessageEvents(ChatEvents):
    """Translates one stream; *prompt_tokens* is 0 where it was not to be learnt beforehand."""

    def __init__(self, expected: Expected, prompt_tokens: int) -> None:
        super().__init__({"prompt_tokens": prompt_tokens})
        self._expected = expected
        self._has_started = False
        self._has_calls = False
        self._blocks = _Blocks()
        self._omitted: list[str] = []
        """Thinking whose text stays here until its block is closed."""

    def _begin(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        message = self._expected.message(usage_of(self._usage))
        return _event({"type": "message_start", "message": message})

    def _still(self) -> bytes:
        return PING

    def _think(self, reasoning: str) -> bytes:
        said = self._open(THINKING, thinking_block())
        shown, estimate = reasoning, None
        if self._expected.omits_thinking:
            self._omitted.append(reasoning)
            shown, estimate = "", max(1, len(reasoning) // CHARACTERS_OF_A_TOKEN)
        delta = {"type": "thinking_delta", "thinking": shown, "estimated_tokens": estimate}
        return said + self._blocks.delta(delta)

    def _say(self, text: str, choice: Json) -> bytes:
        del choice
        said = self._open(TEXT, text_block())
        return said + self._blocks.delta({"type": "text_delta", "text": text})

    def _call(self, part: Json) -> bytes:
        self._has_calls = True
        function = part.get("function") or {}
        block = tool_use_block(part.get("id") or "", function.get("name") or "", {})
        said = self._open(number_of(part), block)
        if arguments := arguments_of(part):
            said += self._blocks.delta({"type": "input_json_delta", "partial_json": arguments})
        return said

    def _open(self, key: str | int, block: Json) -> bytes:
        """Open *block* unless that called *key* is the open one."""
        if self._blocks.open_key == key:
            return b""
        return self._close() + self._blocks.open(key, block)

    def _close(self) -> bytes:
        said = b""
        if self._blocks.open_key == THINKING:
            signature = signature_of("".join(self._omitted))
            self._omitted.clear()
            said = self._blocks.delta({"type": "signature_delta", "signature": signature})
        return said + self._blocks.close()

    def _end(self) -> bytes:
        said = self._close()
        max_tokens, has_calls = self._expected.max_tokens, self._has_calls
        stop = stop_of(self._choice, self._usage, max_tokens, has_calls=has_calls)
        data = {
            "type": "message_delta",
            "delta": {**stop, "container": None},
            "usage": usage_of(self._usage),
            "context_management": None,
        }
        return said + _event(data) + _event({"type": "message_stop"})


class _Blocks:
    """The blocks of one message, one open at a time."""

    def __init__(self) -> None:
        self.open_key: str | int | None = None
        """What the open block is of: thinking, text, or the number of a call."""
        self._index = -1

    def open(self, key: str | int, block: Json) -> bytes:
        """Return the event that opens *block*."""
        self.open_key = key
        self._index += 1
        return self._of_block("content_block_start", content_block=block)

    def delta(self, delta: Json) -> bytes:
        """Return the event that adds to the open block."""
        return self._of_block("content_block_delta", delta=delta)

    def close(self) -> bytes:
        """Return the event that closes the open block, if one is."""
        if self.open_key is None:
            return b""
        self.open_key = None
        return self._of_block("content_block_stop")

    def _of_block(self, kind: str, **fields: Any) -> bytes:
        return _event({"type": kind, "index": self._index, **fields})


def _event(data: Json) -> bytes:
    return sse.event(data, data["type"])
