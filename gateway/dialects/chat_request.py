"""The chat request that a dialect makes of a client's.

Its fields are encoded where the client's body is decoded: for a large one that is in a thread. So
asking a node, or one more, costs the event loop no more than a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

LEVELS_AROUND = 64
"""Of an answer's own, and of calls: before Python 3.12 both count."""
ChatFields = Mapping[str, msgspec.Raw]


def encoded(fields: Mapping[str, Any]) -> ChatFields:
    """Return *fields* as JSON, each of them; raise RecursionError."""
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def check_depth(value: Any) -> None:
    """Raise RecursionError where *value* is too deep to be written in an answer, or an event."""
    for _ in range(LEVELS_AROUND):
        value = [value]
    msgspec.json.encode(value)


def chat_body(fields: ChatFields, node_id: str, *, wants_stream: bool) -> bytes:
    """Return the body of *fields* for a node that calls the model *node_id*."""
    body: dict[str, Any] = {**fields, "model": node_id, "stream": wants_stream}
    if wants_stream:  # engines have no comment to tell it in
        body["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(body)
