"""A node that answers at once: its bytes are prepared, so what is measured is who stands before it.

    GET  /health, /models, /discovery    one model that is loaded, as a gateway's poller asks
    GET  /v1/models                      the same, as OpenAI lists it
    POST /v1/chat/completions            WORDS words, or "max_tokens" of them as a stream

A stream is a role chunk and the first word at once, a word every so many milliseconds as an engine
decodes (more of them at a time would be fewer pieces for whoever reads), then the finish, the usage
(OpenAI's chunk where it is asked for, and a neuron's comment) and ``[DONE]``. It is told in one
line of JSON on standard input where to listen, and how fast words come.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any, cast

import msgspec
import uvloop
from children import answers_kept

from cortex.ipc.node_api import DeviceInfo, Discovery, Health, ModelInfo, ModelLoad, Servable

MODEL = "stub"
CHAT = "/v1/chat/completions"
WORDS = 16
PROMPT_TOKENS = 100
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
STREAM = re.compile(rb'"stream": ?true')
WANTS_USAGE = re.compile(rb'"include_usage": ?true')
HEAD_BYTES = 2**12
"""Of a body, in which what it is asked for stands: what follows is only long."""
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
LAST_PIECE = b"0\r\n\r\n"
ABOUT = {"id": "chatcmpl-stub", "created": 1, "model": MODEL}


def whole(content_type: str, body: bytes, status: str = "200 OK") -> bytes:
    """Return a response with its head."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def as_json(value: Any) -> bytes:
    """Return *value* as a response."""
    return whole("application/json", msgspec.json.encode(value))


def usage(tokens: int) -> dict[str, Any]:
    """Return what an answer of *tokens* has cost."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def answer(tokens: int) -> dict[str, Any]:
    """Return a whole answer."""
    message = {"role": "assistant", "content": "word " * tokens}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
    return {
        **ABOUT,
        "object": "chat.completion",
        "choices": [choice],
        "usage": usage(tokens),
    }


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """Return a piece of a stream with one event."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return _event({"choices": [choice]})


def _event(rest: dict[str, Any]) -> bytes:
    data = {**ABOUT, "object": "chat.completion.chunk", **rest}
    return piece(b"data: " + msgspec.json.encode(data) + b"\n\n")


def piece(data: bytes) -> bytes:
    """Return *data* as HTTP sends pieces."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def ending(tokens: int, *, wants_usage: bool) -> bytes:
    """Return how a stream of *tokens* ends."""
    told = usage(tokens)
    asked_for = _event({"choices": [], "usage": told}) if wants_usage else b""
    comment = b": usage " + msgspec.json.encode(told) + b"\n\n"
    said = asked_for + piece(comment) + piece(b"data: [DONE]\n\n")
    return chunk({}, "length") + said + LAST_PIECE


SAID = [chunk({"content": f"word{number} "}) for number in range(10)]
"""In turn: LiteLLM breaks off a stream that says the same a hundred times."""
BEGIN = STREAM_HEAD + chunk({"role": "assistant", "content": ""}) + SAID[0]
ANSWER = as_json(answer(WORDS))
NOT_FOUND = whole("application/json", b'{"error": {"message": "not here"}}', "404 Not Found")
FLEET = {
    b"/health": as_json(Health(1.0, models=[ModelLoad(MODEL, max_in_flight=1024)])),
    b"/discovery": as_json(
        Discovery("stub", "linux", "0", [DeviceInfo(0, "none", 24576)], ["torch"])
    ),
    b"/models": as_json([ModelInfo(MODEL, "torch", "loaded", [], Servable(ok=True))]),
    b"/v1/models": as_json(
        {"object": "list", "data": [{"id": MODEL, "object": "model", "loaded": True}]}
    ),
}


class Connection(asyncio.Protocol):
    """One client's requests, one after another."""

    def __init__(self, seconds_per_word: float) -> None:
        self._seconds_per_word = seconds_per_word
        self._read = bytearray()
        self._transport: asyncio.Transport | None = None
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Answer there."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop."""
        del exc
        if self._next:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer if that is all of a request."""
        self._read += data
        head = self._read.find(b"\r\n\r\n")
        if head < 0:
            return
        length = LENGTH.search(self._read, 0, head + 2)
        body = head + 4
        if len(self._read) < body + (int(length[1]) if length else 0):
            return
        target = bytes(self._read[: self._read.find(b"\r\n")]).split(b" ")[1]
        asked = bytes(self._read[body : body + HEAD_BYTES])
        self._read.clear()
        self._answer(target, asked)

    def _answer(self, target: bytes, asked: bytes) -> None:
        assert self._transport is not None
        if target != CHAT.encode():
            self._transport.write(FLEET.get(target, NOT_FOUND))
        elif not STREAM.search(asked):
            self._transport.write(ANSWER)
        else:
            tokens = TOKENS.search(asked)
            end = int(tokens[1]) if tokens else WORDS
            self._transport.write(BEGIN)
            began = asyncio.get_running_loop().time()
            self._go_on(began, 1, end, ending(end, wants_usage=bool(WANTS_USAGE.search(asked))))

    def _go_on(self, began: float, said: int, words: int, end: bytes) -> None:
        """Say the next word when it is due: one that comes late puts off none after it."""
        assert self._transport is not None
        if said == words:
            self._transport.write(end)
            return
        due = began + said * self._seconds_per_word
        loop = asyncio.get_running_loop()
        self._next = loop.call_at(due, self._say, began, said, words, end)

    def _say(self, began: float, said: int, words: int, end: bytes) -> None:
        assert self._transport is not None
        self._transport.write(SAID[said % len(SAID)])
        self._go_on(began, said + 1, words, end)


async def serve(hosts: list[str], port: int, seconds_per_word: float) -> asyncio.Server:
    """Listen; return the server."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(seconds_per_word), hosts, port)


def main() -> None:
    """Answer until the parent has gone."""

    async def run() -> None:
        with answers_kept() as out:
            told = json.loads(sys.stdin.readline())[1]
            async with await serve(**told):
                out.write("{}\n")
                await asyncio.to_thread(sys.stdin.read)

    uvloop.run(run())


if __name__ == "__main__":
    main()
