"""The quickstart's questions: asked over plain HTTP in both dialects, answered, timed."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 64,
}
"""The question, in the words that both dialects share."""
ANSWER_SECONDS = 120.0


class Trouble(Exception):
    """What went wrong, in one sentence for the user."""


@dataclass(frozen=True)
class Address:
    """Where a daemon listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def reachable(self) -> Address:
        """Where a client of this machine connects; a wildcard is no destination."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (read here, not bound)
        return Address(loopback.get(self.host, self.host), self.port)


@contextlib.contextmanager
def answered(
    place: Address, path: str, body: dict[str, Any] | None = None, **headers: str
) -> Iterator[http.client.HTTPResponse]:
    """Yield the response to a GET, or to a POST of *body*; refused requests are Trouble."""
    connection = http.client.HTTPConnection(place.host, place.port, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection):
        encoded = json.dumps(body).encode() if body else None
        headers["content-type"] = "application/json"
        connection.request("POST" if body else "GET", path, body=encoded, headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            detail = response.read().decode(errors="replace")
            raise Trouble(f"{path} answered {response.status}: {detail}")
        yield response


@dataclass(frozen=True)
class Answer:
    """What came back, and how fast; a whole answer has no first token to be timed."""

    text: str
    tokens: int
    seconds: float
    first_token_seconds: float | None = None

    @property
    def timing(self) -> str:
        """The numbers in words."""
        if self.first_token_seconds is None:
            return f"{self.seconds:.2f} s, {self.tokens / self.seconds:.0f} tokens/s"
        rate = (self.tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-3)
        return f"first token after {self.first_token_seconds:.2f} s, then {rate:.0f} tokens/s"


@dataclass(frozen=True)
class Dialect:
    """How one API is asked, and where its answers and events keep the text and the token count."""

    name: str
    path: str
    headers: dict[str, str]
    extras_of_streams: dict[str, Any]
    whole: Callable[[dict[str, Any]], tuple[str, int]]
    piece: Callable[[dict[str, Any]], tuple[str, int | None]]


def openai_piece(event: dict[str, Any]) -> tuple[str, int | None]:
    """Return text and final token count of one chat.completion.chunk."""
    text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return text, (event.get("usage") or {}).get("completion_tokens")


def anthropic_piece(event: dict[str, Any]) -> tuple[str, int | None]:
    """Return text and final token count of one Messages event."""
    tokens = event["usage"]["output_tokens"] if event["type"] == "message_delta" else None
    return event["delta"].get("text", "") if event["type"] == "content_block_delta" else "", tokens


DIALECTS = (
    Dialect(
        "OpenAI",
        "/v1/chat/completions",
        {},
        {"stream_options": {"include_usage": True}},
        lambda a: (a["choices"][0]["message"]["content"], a["usage"]["completion_tokens"]),
        openai_piece,
    ),
    Dialect(
        "Anthropic",
        "/v1/messages",
        {"anthropic-version": "2023-06-01"},
        {},
        lambda a: ("".join(b.get("text", "") for b in a["content"]), a["usage"]["output_tokens"]),
        anthropic_piece,
    ),
)


@contextlib.contextmanager
def understood(dialect: Dialect) -> Iterator[None]:
    """Turn an answer of another shape than the dialect promises into Trouble."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as exc:
        raise Trouble(f"{dialect.path} gave an answer of an unknown shape: {exc!r}.") from exc


def ask(place: Address, dialect: Dialect) -> Answer:
    """Ask for a whole answer."""
    start = time.monotonic()
    with understood(dialect), answered(place, dialect.path, BODY, **dialect.headers) as response:
        text, tokens = dialect.whole(json.load(response))
    return Answer(text, tokens, time.monotonic() - start)


def ask_streaming(place: Address, dialect: Dialect) -> Answer:
    """Ask for a stream; an error in it is Trouble."""
    text, tokens, first, start = "", 0, None, time.monotonic()
    body = BODY | {"stream": True} | dialect.extras_of_streams
    with understood(dialect), answered(place, dialect.path, body, **dialect.headers) as lines:
        for event in events(lines):
            if "error" in event:
                raise Trouble(f"{dialect.path} broke off: {event['error']}")
            piece, count = dialect.piece(event)
            first = time.monotonic() - start if piece and first is None else first
            text, tokens = text + piece, count or tokens
    return Answer(text, tokens, time.monotonic() - start, first or 0.0)


def events(lines: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON of an event stream."""
    for line in lines:
        field, _, value = line.decode().strip().partition(": ")
        if field == "data" and value != "[DONE]":
            yield json.loads(value)


def ask_everything(place: Address) -> None:
    """Ask in both dialects, whole and streamed; Trouble where an answer lacks Paris."""
    print(f"\n{QUESTION}\n")
    for dialect in DIALECTS:
        for manner, asking in (("whole", ask), ("streamed", ask_streaming)):
            answer = asking(place, dialect)
            text = " ".join(answer.text.split())
            print(f"  {dialect.name:<9} {manner:<8}  {text}  ({answer.timing})", flush=True)
            if "paris" not in text.lower():
                raise Trouble(f"the {manner} answer of {dialect.path} does not name Paris.")
