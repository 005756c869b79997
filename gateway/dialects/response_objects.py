"""The Response object, the items of its output, and a node's whole answer as one.

The object has every key of OpenAI's strict schema, at any time. What the client did not ask for
stands there at the schema's neutral value, which says nothing of the model's own defaults.

    node's message       output item
    reasoning_content    reasoning: its text as content; also as its summary where one is asked for,
                         because clients that show no raw reasoning show that
    content              message, of one output_text
    tool_calls           function_call, one each
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from cortex.gateway.dialects.response_tools import Offer
from cortex.ipc.errors import ApiError, NodeFailed

Item = dict[str, Any]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed"]
CUTS = {"length": "max_output_tokens", "content_filter": "content_filter"}
NEVER = -9999.0
"""OpenAI's logarithm of no probability at all."""


def new_id() -> str:
    """Return what the ids of a response and of all that belongs to it have in common."""
    return uuid.uuid4().hex


def _now() -> int:
    return int(time.time())


@dataclass(frozen=True)
class Outline:
    """What is known of a response before the node answers, and stays the same."""

    model: str
    asked: dict[str, Any]
    """What the object repeats of the request."""
    offer: Offer = field(default_factory=Offer)
    wants_summary: bool = False
    key: str = field(default_factory=new_id)
    created_at: int = field(default_factory=_now)

    @property
    def id(self) -> str:
        """The id of the response."""
        return f"resp_{self.key}"

    def item_id(self, kind: str, index: int | str) -> str:
        """Return the id of the item *index*; the response can be told from it."""
        return f"{kind}_{self.key}_{index}"

    def response(self, status: Status, **more: Any) -> dict[str, Any]:
        """Return the object in *status*; *more* are output, usage, error, incomplete_details."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": _now() if status == "completed" else None,
            "status": status,
            "model": self.model,
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
            **self.asked,
            **more,
        }

    def ended(self, output: list[Item], ending: Ending) -> dict[str, Any]:
        """Return the object of an answer that the node has ended."""
        usage = usage_of(ending.usage)
        if reason := ending.cut_by:
            details = {"reason": reason}
            return self.response(
                "incomplete", output=output, usage=usage, incomplete_details=details
            )
        return self.response("completed", output=output, usage=usage)

    def failed(self, error: ApiError, output: list[Item]) -> dict[str, Any]:
        """Return the object of an answer that *error* has ended."""
        said = {"code": error.code, "message": str(error)}
        return self.response("failed", output=output, error=said)

    def reasoning(self, index: int, text: str | None, status: str) -> Item:
        """Return a reasoning item; None: nothing is said yet."""
        is_summed = self.wants_summary and text is not None
        return {
            "id": self.item_id("rs", index),
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": text}] if is_summed else [],
            "content": [] if text is None else [{"type": "reasoning_text", "text": text}],
            "status": status,
        }

    def message(self, index: int, content: list[dict[str, Any]], status: str) -> Item:
        """Return an item of the assistant's words."""
        return {
            "id": self.item_id("msg", index),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def call(self, index: int, call_id: str, name: str, arguments: str, status: str) -> Item:
        """Return a call of the function that the node calls *name*."""
        return {
            "id": self.item_id("fc", index),
            "type": "function_call",
            "status": status,
            "call_id": call_id,
            **self.offer.called(name),
            "arguments": arguments,
        }


@dataclass(frozen=True)
class Ending:
    """How a node's answer has ended."""

    finish_reason: str | None
    usage: dict[str, Any]

    @property
    def cut_by(self) -> str | None:
        """What has ended it before its time, as Responses calls it."""
        return CUTS.get(self.finish_reason or "")

    @property
    def status(self) -> str:
        """The status of its last item."""
        return "incomplete" if self.cut_by else "completed"


def output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of a message that is its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def logprobs_of(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a node's *tokens* with a number where the model gave no probability."""
    return [{**token, "logprob": _number(token["logprob"])} for token in tokens]


def _number(logprob: float | None) -> float:
    return NEVER if logprob is None else logprob


def usage_of(usage: dict[str, Any]) -> dict[str, Any]:
    """Return a node's usage in the words of Responses."""
    prompt, completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }


def response_of(body: bytes, outline: Outline) -> dict[str, Any]:
    """Return a node's chat completion as *outline*'s response; raise NodeFailed if it is none."""
    try:
        completion = orjson.loads(body)
        choice = completion["choices"][0]
        ending = Ending(choice.get("finish_reason"), completion["usage"])
        output = _output(choice, outline, ending)
        return outline.ended(output, ending)
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError) as exc:
        raise NodeFailed("the node's answer is not a chat completion") from exc


def _output(choice: dict[str, Any], outline: Outline, ending: Ending) -> list[Item]:
    """Return the items of *choice*, each complete but perhaps for the last."""
    message = choice["message"]
    makers: list[Callable[[int, str], Item]] = []
    if reasoning := message.get("reasoning_content"):
        makers.append(lambda index, status: outline.reasoning(index, reasoning, status))
    if text := message.get("content"):
        tokens = (choice.get("logprobs") or {}).get("content") or []
        content = [output_text(text, logprobs_of(tokens_of(text, tokens)))]
        makers.append(lambda index, status: outline.message(index, content, status))
    makers.extend(_call(call, outline) for call in message.get("tool_calls") or [])
    last = len(makers) - 1
    return [
        make(index, ending.status if index == last else "completed")
        for index, make in enumerate(makers)
    ]


def _call(call: dict[str, Any], outline: Outline) -> Callable[[int, str], Item]:
    call_id, function = call["id"], call["function"]
    name, arguments = function["name"], function["arguments"]
    return lambda index, status: outline.call(index, call_id, name, arguments, status)


def tokens_of(text: str, tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of an answer's *tokens* that *text* was made of.

    Reasoning comes before the text, and calls after it; a token may be a piece of a character.
    """
    spelt = [bytes(token["bytes"]) for token in tokens]
    begin = b"".join(spelt).rfind(text.encode())
    if begin < 0:
        return tokens
    end, at, found = begin + len(text.encode()), 0, []
    for token, piece in zip(tokens, spelt, strict=True):
        if at < end and at + len(piece) > begin:
            found.append(token)
        at += len(piece)
    return found
