"""The chat request that a dialect makes of a client's.

Its fields are encoded where the client's body is decoded: for a large one that is in a thread. So
asking a node, or one more, costs the event loop no more than a copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from cortex.ipc.errors import ApiError

COUNTED = (
    "messages",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "reasoning_effort",
    "thinking",
    "add_generation_prompt",
    "continue_final_message",
)
"""What of a chat request makes its prompt."""
MADE_HERE = re.compile(r"(messages|tools|response_format)[.\[].*")
"""Places in what a dialect writes anew, which its client has never seen."""
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


def count_body(fields: ChatFields, node_id: str) -> bytes:
    """Return the request that counts the tokens of the prompt that *fields* make."""
    counted = {name: fields[name] for name in COUNTED if name in fields}
    return msgspec.json.encode({"model": node_id, **counted})


def refusal_of(error: ApiError, words: Mapping[str, str]) -> ApiError:
    """Return a node's *error* without a place that its client does not know.

    *words*: what the client calls what a node calls so, as the place or in quotes in the message.
    """
    place = error.param or ""
    text = re.sub(r"'(\w+)'", lambda it: f"'{words.get(it[1], it[1])}'", str(error))
    known = None if MADE_HERE.fullmatch(place) else words.get(place, error.param)
    if known != error.param:
        text = text.removeprefix(f"{place}: ")
    told = type(error).__new__(type(error), text)  # a copy: others may have met the same one
    vars(told).update(vars(error), param=known)
    return told
