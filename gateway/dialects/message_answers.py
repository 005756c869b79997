"""A node's whole answer as Anthropic's message, and what its events share with it.

    node                        client
    reasoning_content           thinking; without its text where the client wants to omit it
    content                     text
    tool_calls                  tool_use; a call that was cut is left out: nobody may run half of it

    finish_reason               stop_reason
    tool_calls                  tool_use
    length                      max_tokens, or model_context_window_exceeded before that many
    content_filter              refusal
    stop                        stop_sequence where the node names the string; else tool_use where
                                tools are called (engines say ``stop`` for a call that was demanded)
    another                     end_turn

Every field that the published schema requires is there, with ``?beta=true`` and without, null
where we have nothing to say.

    usage
    input_tokens                    of the prompt, those that had to be computed
    cache_read_input_tokens         of the prompt, those that the node had in its cache
    cache_creation_input_tokens     0: what is computed is kept by itself, and costs no more for it
    thinking_tokens                 as the node counts them, where it does
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from cortex.gateway.dialects.message_thinking import signature_of
from cortex.ipc.errors import MalformedToolCall, NodeFailed
from cortex.ipc.openai_answers import CONTEXT_FULL

Json = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What a request says about the form of its answer."""

    model: str
    """As the client named it."""
    max_tokens: int | None = None
    omits_thinking: bool = False
    diagnostics: Json | None = None

    def message(self, usage: Json) -> Json:
        """Return a message that says nothing yet."""
        return {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "context_management": None,
            "diagnostics": self.diagnostics,
            "usage": usage,
        }


def usage_of(usage: Json) -> Json:
    """Return a node's usage as Anthropic counts: cached tokens are not among the input tokens."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    return {
        "input_tokens": max(usage.get("prompt_tokens", 0) - cached, 0),
        "output_tokens": usage.get("completion_tokens", 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "cache_creation": None,
        "inference_geo": None,
        "output_tokens_details": None if thinking is None else {"thinking_tokens": thinking},
        "server_tool_use": None,
        "service_tier": "standard",
        "speed": "standard",
        "fallback_credit": None,
        "iterations": None,
    }


def stop_of(choice: Json, usage: Json, max_tokens: int | None, *, has_calls: bool) -> Json:
    """Return why a finished *choice* stopped, as the fields of a message."""
    finish, sequence = choice.get("finish_reason"), choice.get("stop_reason")
    reason = {"length": "max_tokens", "content_filter": "refusal"}.get(finish or "", "end_turn")
    told, counted = sequence == CONTEXT_FULL, usage.get("completion_tokens", 0)
    if finish == "length" and (told or 0 < counted < (max_tokens or 0)):  # engines do not tell
        reason = "model_context_window_exceeded"
    if finish == "stop" and isinstance(sequence, str):
        return _stop("stop_sequence", sequence)
    if finish == "tool_calls" or (finish == "stop" and has_calls):
        reason = "tool_use"
    return _stop(reason)


def message_of(body: bytes, expected: Expected) -> Json:
    """Return a node's chat completion as a message; raise NodeFailed where it is none."""
    try:
        completion = msgspec.json.decode(body)
        choice, usage = completion["choices"][0], completion["usage"]
        said = choice["message"]
        content = _content(said, expected, may_be_cut=choice.get("finish_reason") != "tool_calls")
        message = expected.message(usage_of(usage))
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError) as exc:
        raise NodeFailed("the node's answer is not a chat completion") from exc
    has_calls = any(block["type"] == "tool_use" for block in content)
    stop = stop_of(choice, usage, expected.max_tokens, has_calls=has_calls)
    return {**message, "content": content, **stop}


def thinking_block(thinking: str = "", signature: str = "") -> Json:
    """Return a block of thinking, empty for a stream."""
    return {"type": "thinking", "thinking": thinking, "signature": signature}


def text_block(text: str = "") -> Json:
    """Return a block of text, empty for a stream."""
    return {"type": "text", "text": text, "citations": None}


def tool_use_block(call_id: str, name: str, arguments: Json) -> Json:
    """Return a call, without arguments for a stream."""
    return {
        "type": "tool_use",
        "id": call_id,
        "name": name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def _stop(reason: str, sequence: str | None = None) -> Json:
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _content(said: Json, expected: Expected, *, may_be_cut: bool) -> list[Json]:
    blocks: list[Json] = []
    if (reasoning := said.get("reasoning_content")) and expected.omits_thinking:
        blocks.append(thinking_block(signature=signature_of(reasoning)))
    elif reasoning:
        blocks.append(thinking_block(reasoning))
    if text := said.get("content"):
        blocks.append(text_block(text))
    for call in said.get("tool_calls") or []:
        function = call["function"]
        arguments = _arguments(function["arguments"], may_be_cut=may_be_cut)
        if arguments is not None:
            blocks.append(tool_use_block(call["id"], function["name"], arguments))
    return blocks


def _arguments(text: str, *, may_be_cut: bool) -> Json | None:
    """Return the arguments of a call; None where it was cut before their end."""
    try:
        arguments = msgspec.json.decode(text)
    except msgspec.DecodeError:
        arguments = None if text or may_be_cut else {}
    if isinstance(arguments, dict):
        return arguments
    if may_be_cut:
        return None
    raise MalformedToolCall("the model called a tool with what is no JSON object")
