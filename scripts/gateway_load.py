"""A client that costs little itself: prepared requests on kept connections, and words counted.

Every connection sends its request again as soon as it has the answer, so that as many are open at
a time as there are connections. An answer that is not 200, or that breaks off, is Trouble.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from answers import Address, Trouble

PATIENCE_SECONDS = 60.0
READ_BYTES = 2**18
CHAT = "/v1/chat/completions"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HEAD_ENDS = b"\r\n\r\n"
LAST_PIECE = b"\r\n0\r\n\r\n"
"""With the line end before it: the last header of a head may end in 0, too."""
FILLING = "All of this has been said before, and it will be said again. "


@dataclass(frozen=True)
class Ended:
    """One answer: seconds until its body began, and until it ended; what it said."""

    first: float
    seconds: float
    words: int
    """How often it says "word", which is all that ``stub_node.py`` has to say."""


def chat(model: str, body_bytes: int, session: int, **rest: Any) -> dict[str, Any]:
    """Return a chat request whose JSON has about *body_bytes*, in turns of 1 kB at most."""
    turns: list[dict[str, str]] = []
    left = body_bytes - 200
    while left > 0:
        role = "assistant" if len(turns) % 2 else "user"
        text = f"{session}.{len(turns)} " + FILLING * 17
        turns.append({"role": role, "content": text[: max(left, 10)]})
        left -= len(turns[-1]["content"]) + 40
    return {"model": model, **rest, "temperature": 0, "messages": turns}


def request(place: Address, key: str, body: dict[str, Any]) -> bytes:
    """Return a POST of *body*, byte by byte."""
    encoded = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {place}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def ask(place: Address, requests: Sequence[bytes], count: int) -> list[Ended]:
    """Send *requests*, each on a connection of its own and over and over, *count* in all."""
    ended: list[Ended] = []
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        connections = [_Connection(place, each, stack) for each in requests[:count]]
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.send()
        sent = len(connections)
        while len(ended) < count:
            ready = selector.select(PATIENCE_SECONDS)
            if not ready:
                raise Trouble(f"{place} is silent; {len(ended)} of {count} answers came")
            for key, _ in ready:
                if (done := key.data.read()) is None:
                    continue
                ended.append(done)
                if sent < count:
                    key.data.send()
                    sent += 1
                else:
                    selector.unregister(key.fileobj)
    return ended


class Answer:
    """What of an answer has come."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._body_at = 0

    def take(self, piece: bytes) -> None:
        """Add *piece*; raise Trouble where the head refuses."""
        self._bytes += piece
        if self._body_at or (found := self._bytes.find(HEAD_ENDS)) < 0:
            return
        self._body_at = found + len(HEAD_ENDS)
        if self._bytes[8:13] != b" 200 ":
            raise Trouble(f"refused: {bytes(self._bytes[:600])!r}")

    @property
    def has_begun(self) -> bool:
        """Whether any of the body is there."""
        return 0 < self._body_at < len(self._bytes)

    @property
    def is_whole(self) -> bool:
        """Whether all of it is."""
        if not self.has_begun:
            return False
        length = LENGTH.search(self._bytes, 0, self._body_at)
        if length:
            return len(self._bytes) >= self._body_at + int(length[1])
        return self._bytes.endswith(LAST_PIECE)

    @property
    def words(self) -> int:
        """How often it says "word"."""
        return self._bytes.count(b"word", self._body_at)


class _Connection:
    """A connection that is kept, its request, and the answer to it."""

    def __init__(self, place: Address, request: bytes, stack: ExitStack) -> None:
        self.socket = stack.enter_context(socket.create_connection((place.host, place.port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request

    def send(self) -> None:
        """Send the request."""
        self._answer = Answer()
        self._first_at = 0.0
        self._sent_at = time.perf_counter()
        self.socket.sendall(self._request)

    def read(self) -> Ended | None:
        """Take what is there; return how it went if the answer ends with that."""
        piece = self.socket.recv(READ_BYTES)
        now = time.perf_counter()
        if not piece:
            raise Trouble("an answer broke off")
        self._answer.take(piece)
        if self._answer.has_begun:
            self._first_at = self._first_at or now
        if not self._answer.is_whole:
            return None
        first = self._first_at - self._sent_at
        return Ended(first, now - self._sent_at, self._answer.words)
