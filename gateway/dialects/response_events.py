"""A node's chat stream as the events of a response, each with its type and its number.

    node, or gateway              client
    waiting for a load            response.created, response.queued; then comments that tell of it
    first chunk                   response.created (unless that was said), response.in_progress
    nothing but a keep-alive      a comment; each tenth time response.queued or .in_progress once
                                  more, because some clients count events, and no comments, as
                                  signs of life
    reasoning, text or a call     output_item.added, ... as ``response_forming.py`` has it
    then another of these         ... and output_item.done of the last one
    [DONE]                        the same, and response.completed, or response.incomplete where a
                                  limit has cut the answer
    error frame                   nothing; the proxy asks for response.failed, as it does where the
                                  connection broke

Keep-alives come about once in a second of silence. No ``[DONE]``: OpenAI sends none here either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cortex.gateway import sse
from cortex.gateway.dialects.call_order import arguments_of, number_of
from cortex.gateway.dialects.chat_events import ChatEvents
from cortex.gateway.dialects.response_forming import (
    Forming,
    FormingCall,
    FormingMessage,
    FormingReasoning,
    Told,
)
from cortex.gateway.dialects.response_objects import (
    Ending,
    Item,
    Outline,
    Status,
    logprobs_of,
    tokens_of,
)
from cortex.ipc.errors import ApiError

KEEP_ALIVES_PER_EVENT = 10


class Numbered:
    """The events of one response, whoever says them: the waiting gateway, a node, a failure."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.output: list[Item] = []
        """The items that are complete."""
        self.is_over = False
        """Whether the last event has been told."""
        self._number = 0
        self._keep_alives = 0
        self._status: Status | None = None

    def say(self, kind: str, **fields: Any) -> bytes:
        """Return the next event."""
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return sse.event(data, kind)

    def say_all(self, told: Told) -> bytes:
        """Return the next events."""
        return b"".join(self.say(kind, **fields) for kind, fields in told)

    def enter(self, status: Status) -> bytes:
        """Return what tells that the response is queued or in progress, unless that was told."""
        if self._status == status:
            return b""
        said = b"" if self._status else self._tell("created", status)
        self._status = status
        return said + self._tell(status, status)

    def keep_alive(self, status: Status, text: str) -> bytes:
        """Return what keeps the stream alive while there is nothing else to tell."""
        said = self.enter(status)
        self._keep_alives += 1
        if self._keep_alives % KEEP_ALIVES_PER_EVENT:
            return said + sse.comment(text)
        return said + self._tell(status, status)

    def end(self, response: dict[str, Any]) -> bytes:
        """Return the last event, which holds the whole *response*."""
        self.is_over = True
        return self.say(f"response.{response['status']}", response=response)

    def fail(self, error: ApiError) -> bytes:
        """Return the last event of a response that *error* has ended; a comment if it is over."""
        if self.is_over:
            return sse.comment(str(error))
        said = self.enter("in_progress")
        return said + self.end(self.outline.failed(error, self.output))

    def _tell(self, event: str, status: Status) -> bytes:
        return self.say(f"response.{event}", response=self.outline.response(status))


class ResponseEvents(ChatEvents):
    """Translates one stream of a node; *keep* gets the response that it has become."""

    def __init__(self, numbered: Numbered, keep: Callable[[dict[str, Any]], None]) -> None:
        super().__init__({})
        self._numbered = numbered
        self._keep = keep
        self._forming: Forming | None = None

    def _begin(self) -> bytes:
        return self._numbered.enter("in_progress")

    def _still(self) -> bytes:
        return self._numbered.keep_alive("in_progress", "keep-alive")

    def _think(self, reasoning: str) -> bytes:
        return self._into(FormingReasoning) + self._add(reasoning)

    def _say(self, text: str, choice: dict[str, Any]) -> bytes:
        delta, tokens = choice["delta"], (choice.get("logprobs") or {}).get("content") or []
        if delta.get("reasoning_content") or delta.get("tool_calls"):
            tokens = tokens_of(text, tokens)
        return self._into(FormingMessage) + self._add(text, logprobs_of(tokens))

    def _call(self, part: dict[str, Any]) -> bytes:
        number, said = number_of(part), b""
        if not (isinstance(self._forming, FormingCall) and self._forming.number == number):
            name, call_id = (part.get("function") or {}).get("name") or "", part.get("id") or ""
            said = self._open(partial(FormingCall, number=number, call_id=call_id, name=name))
        arguments = arguments_of(part)
        return said + self._add(arguments) if arguments else said

    def _into(self, kind: type[FormingReasoning | FormingMessage]) -> bytes:
        """Return what has to be said before something of *kind* is added."""
        return b"" if isinstance(self._forming, kind) else self._open(kind)

    def _open(self, make: Callable[[Outline, int], Forming]) -> bytes:
        said = self._close("completed")
        forming = make(self._numbered.outline, len(self._numbered.output))
        self._forming = forming
        said += self._numbered.say(
            "response.output_item.added",
            output_index=forming.index,
            item=forming.item("in_progress"),
        )
        return said + self._numbered.say_all(forming.begin())

    def _add(self, text: str, tokens: list[dict[str, Any]] | None = None) -> bytes:
        assert self._forming is not None
        return self._numbered.say_all(self._forming.add(text, tokens or []))

    def _close(self, status: str) -> bytes:
        if (forming := self._forming) is None:
            return b""
        self._forming = None
        said = self._numbered.say_all(forming.end())
        item = forming.item(status)
        self._numbered.output.append(item)
        return said + self._numbered.say(
            "response.output_item.done", output_index=forming.index, item=item
        )

    def _end(self) -> bytes:
        ending = Ending(self._choice.get("finish_reason"), self._usage)
        said = self._close(ending.status)
        response = self._numbered.outline.ended(self._numbered.output, ending)
        self._keep(response)
        return said + self._numbered.end(response)
