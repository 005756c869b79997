"""Streams put together again, as the clients of each dialect do it, and what upsets them.

chat         chunks in order, one finish, usage last where it is asked for, ``[DONE]``
messages     message_start, blocks that are opened, filled and closed one after the other,
             message_delta with a stop reason, message_stop
responses    sequence numbers from 0 without gaps, names that are the types, one last event that
             holds the whole response
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from cortex.gateway.doctor_check import NotPossible, Wrong, need
from cortex.gateway.doctor_wire import Event, Json, Reply

REFUSED_IN_WORDS = frozenset({"unsupported_parameter"})


@dataclass
class Whole:
    """An answer of any dialect, as far as checks look at it."""

    text: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    """Id, name, and the text of the arguments."""
    finish: str | None = None
    usage: Json = field(default_factory=dict)

    def call_of(self, name: str) -> tuple[str, Json]:
        """Return the id and the arguments of the call of *name*; raise Wrong."""
        for call_id, called, arguments in self.calls:
            if called == name:
                return call_id, arguments_in(arguments)
        raise Wrong(f"the call of {name!r} that was demanded did not come")


def accepted(reply: Reply, status: int = 200) -> Reply:
    """Return *reply* if it has *status*; raise NotPossible for a refusal in words, else Wrong."""
    if reply.status == status:
        return reply
    if reply.status == 400 and reply.error.get("code") in REFUSED_IN_WORDS:
        raise NotPossible(str(reply.error.get("message")))
    raise Wrong(reply.refusal)


def arguments_in(text: str) -> Json:
    """Return the JSON object in *text*; raise Wrong."""
    try:
        arguments = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Wrong(f"the arguments of a call are no JSON: {text[:80]!r}") from None
    need(isinstance(arguments, dict), f"the arguments of a call are no object: {text[:80]!r}")
    return dict(arguments)


def refuse_error(events: Iterable[Event]) -> None:
    """Raise Wrong where a stream ends with an error."""
    for event in events:
        error = event.data.get("error") or (event.data.get("response") or {}).get("error")
        if isinstance(error, dict):
            raise Wrong(f"the stream broke off: {error.get('message')}")


def chat_of(reply: Reply, *, wants_usage: bool) -> Whole:
    """Return the answer in a chat stream; raise Wrong, NotPossible."""
    accepted(reply)
    refuse_error(reply.events)
    need(reply.events, "no chunk came")
    need(reply.is_done, "the stream ends without [DONE]")
    whole = Whole()
    for event in reply.events:
        need(event.data.get("object") == "chat.completion.chunk", "a chunk is of another object")
        whole.usage = event.data.get("usage") or whole.usage
        for choice in event.data.get("choices") or []:
            _add_delta(whole, choice)
    need(whole.finish, "no chunk has a finish_reason")
    if wants_usage:
        need(whole.usage.get("total_tokens"), "no usage came, and include_usage asked for it")
        need(reply.events[-1].data.get("choices") == [], "the usage is not in a chunk of its own")
    return whole


def _add_delta(whole: Whole, choice: Json) -> None:
    delta = choice.get("delta") or {}
    whole.text += delta.get("content") or ""
    whole.finish = choice.get("finish_reason") or whole.finish
    for call in delta.get("tool_calls") or []:
        function, index = call.get("function") or {}, call.get("index", 0)
        if index == len(whole.calls):
            need(call.get("id"), "a call begins without an id")
            whole.calls.append((call["id"], function.get("name") or "", ""))
        need(0 <= index < len(whole.calls), "a call is added to before it begins")
        call_id, name, arguments = whole.calls[index]
        whole.calls[index] = (call_id, name, arguments + (function.get("arguments") or ""))


def message_of(reply: Reply) -> Whole:
    """Return the answer in a stream of Anthropic's; raise Wrong, NotPossible."""
    accepted(reply)
    refuse_error(reply.events)
    events = [event for event in reply.events if event.data.get("type") != "ping"]
    for event in events:
        kind = event.data.get("type")
        need(event.name == kind, f"an event of type {kind!r} is called {event.name!r}")
    kinds = [event.name for event in events]
    need(kinds[:1] == ["message_start"], "the first event is not message_start")
    need(
        kinds[-2:] == ["message_delta", "message_stop"], "message_delta, message_stop: no such end"
    )
    whole = Whole(usage=dict(events[0].data["message"]["usage"]))
    _add_blocks(whole, events[1:-2])
    end = events[-2].data
    whole.finish = end["delta"].get("stop_reason")
    whole.usage |= end.get("usage") or {}
    need(whole.finish, "the message ends without a stop_reason")
    return whole


def _add_blocks(whole: Whole, events: Iterable[Event]) -> None:
    opened: Json | None = None
    index = -1
    arguments = ""
    for event in events:
        data = event.data
        if event.name == "content_block_start":
            need(opened is None, "a block is opened before the last one is closed")
            need(data.get("index") == index + 1, "the indices of the blocks have gaps")
            opened, index, arguments = data["content_block"], index + 1, ""
        elif event.name == "content_block_delta":
            need(opened is not None, "something is added to no block")
            need(data.get("index") == index, "something is added to a block that is not open")
            whole.text += data["delta"].get("text") or ""
            arguments += data["delta"].get("partial_json") or ""
        elif event.name == "content_block_stop":
            need(opened is not None, "a block is closed that is not open")
            if opened and opened["type"] == "tool_use":
                whole.calls.append((opened["id"], opened["name"], arguments or "{}"))
            opened = None
    need(opened is None, "a block is left open")


def response_of(reply: Reply) -> Whole:
    """Return the answer in a stream of Responses; raise Wrong, NotPossible."""
    accepted(reply)
    refuse_error(reply.events)
    need(reply.events, "no event came")
    for number, event in enumerate(reply.events):
        kind = event.data.get("type")
        need(event.name in (None, kind), f"an event of type {kind!r} is called {event.name!r}")
        need(event.data.get("sequence_number") == number, "the sequence numbers have gaps")
    need(reply.events[0].data["type"] == "response.created", "response.created is not the first")
    last = reply.events[-1].data
    need(
        last["type"] in ("response.completed", "response.incomplete"),
        f"the last event is {last['type']!r}",
    )
    return _of_response(last["response"])


def _of_response(response: Json) -> Whole:
    whole = Whole(finish=response["status"], usage=response.get("usage") or {})
    for item in response["output"]:
        if item["type"] == "message":
            whole.text += "".join(part.get("text") or "" for part in item["content"])
        elif item["type"] == "function_call":
            whole.calls.append((item["call_id"], item["name"], item["arguments"]))
    return whole


def shaped(value: Any, *names: str) -> None:
    """Raise Wrong unless *value* is an object with these members."""
    need(isinstance(value, dict), "the answer is no JSON object")
    missing = [name for name in names if name not in value]
    need(not missing, f"the answer has no {', '.join(missing)}")
