"""Server-sent events, as bytes: what comes in pieces is cut into events.

An event is what stands before an empty line; here its lines are kept whole. A line that starts
with a colon is a comment: neurons send them to keep a stream alive, and one of them,
``: usage {json}``, tells what the request has cost.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import orjson

END = b"\n\n"
EMPTY_LINE = re.compile(rb"\n\r?\n")
DATA = b"data: "
DONE = b"data: [DONE]"
USAGE = b": usage "
KEEP_ALIVE = b": keep-alive\n\n"
ERROR = b'data: {"error"'
"""How the frame begins with which a neuron ends a stream that failed."""


class EventSplitter:
    """Cuts a stream of bytes into events; what is incomplete waits for the next piece."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that *chunk* completes, without the empty line."""
        looked_at = max(len(self._rest) - 2, 0)  # what was there ended in "\n\r" at most
        self._rest += chunk
        if not EMPTY_LINE.search(self._rest, looked_at):
            return []
        *events, rest = bytes(self._rest).replace(b"\r\n", b"\n").split(END)
        self._rest = bytearray(rest)
        return events


def is_comment(event: bytes) -> bool:
    """Whether nothing but a comment is in *event*."""
    return event.startswith(b":")


def data_of(event: bytes) -> dict[str, Any] | None:
    """Return the JSON object that *event* carries, or None: a comment, ``[DONE]``, not JSON."""
    if not event.startswith(DATA + b"{"):
        return None
    try:
        data: dict[str, Any] = orjson.loads(event[len(DATA) :])
    except orjson.JSONDecodeError:
        return None
    return data


def usage_of(event: bytes) -> dict[str, Any] | None:
    """Return the usage in *event*, if it is the comment that tells it."""
    if not event.startswith(USAGE):
        return None
    try:
        usage: dict[str, Any] = orjson.loads(event[len(USAGE) :])
    except orjson.JSONDecodeError:
        return None
    return usage


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Return *data* as an event, with a name where the dialect has them."""
    head = f"event: {name}\n".encode() if name else b""
    return head + DATA + msgspec.json.encode(data) + END  # orjson refuses whole numbers of 65 bits


def comment(text: str) -> bytes:
    """Return *text*, one line of it, as a comment."""
    return f": {' '.join(text.split())}\n\n".encode()
