"""How the requests of scripts/soak end, and which ends are right.

A request ends once: with its answer, with one error and no [DONE], or because its client left.
Everything else is a violation; so is a stream that is only kept alive, and an answer that is not as
it was demanded (``soak_demands.py``).
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import soak_demands
from answers import Address
from soak_requests import Request

SILENCE_SECONDS = 120.0
"""No stream may say nothing for as long: it would be a request that has not ended."""

SIPPED_BYTES = 4096


@dataclass(frozen=True)
class End:
    """How a request ended; ``wrong`` says what is against the rules, if anything is."""

    request: Request
    how: str
    wrong: str | None = None
    cached_tokens: int = 0
    """Of its prompt, those that were found in the prefix cache, as far as it says."""


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
    wrong = None if all(reasons) else "no finish reason"
    if request.demands and not wrong:
        text = _text(answer["choices"][0]["message"])
        wrong = soak_demands.wrong(request.demands, text, reasons[0])
    return End(request, "/".join(map(str, reasons)), wrong)


def _text(said: dict[str, Any]) -> str:
    """Return what a message, or a piece of one, says, with its calls as ``CALL`` has it."""
    text = said.get("content") or ""
    for call in said.get("tool_calls") or ():
        name = call["function"].get("name")
        text += (f"{soak_demands.CALL}{name} " if name else "") + call["function"].get(
            "arguments", ""
        )
    return text


@dataclass
class Watched:
    """What has been seen of a stream."""

    events: int = 0
    finishes: list[str] = field(default_factory=list)
    dones: int = 0
    errors: list[str] = field(default_factory=list)
    text: str = ""
    cached_tokens: int = 0

    def see(self, event: dict[str, Any]) -> None:
        """Note an event of either dialect."""
        self.events += 1
        if error := event.get("error"):
            self.errors.append(str(error.get("code") or error.get("type")))
        if event.get("type") == "message_delta":
            self.finishes.append(str(event["delta"]["stop_reason"]))
        self.dones += event.get("type") == "message_stop"
        if details := (event.get("usage") or {}).get("prompt_tokens_details"):
            self.cached_tokens = details.get("cached_tokens") or 0
        for choice in event.get("choices", ()):
            self.text += _text(choice.get("delta", {}))
            if choice.get("finish_reason"):
                self.finishes.append(choice["finish_reason"])

    def wrong(self, request: Request) -> str | None:
        """Return which rule its end breaks."""
        if self.errors:
            return "goes on after an error" if self.dones or len(self.errors) > 1 else None
        if self.dones != 1:
            return f"{self.dones} ends"
        if len(self.finishes) != request.choices:
            return f"{len(self.finishes)} finish reasons"
        if request.demands:
            return soak_demands.wrong(request.demands, self.text, self.finishes[0])
        return None


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
    wrong = seen.wrong(request)
    if wrong is None and seen.errors and seen.errors[0] not in request.may_fail_with:
        wrong = f"an error in the stream: {seen.errors[0]}"
    how = seen.errors[0] if seen.errors else "/".join(seen.finishes)
    return End(request, how, wrong, seen.cached_tokens)


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a stream; None is [DONE]. Raise TimeoutError where none comes.

    Comments that only keep the connection alive are none.
    """
    last = time.monotonic()
    for line in lines:
        name, _, value = line.decode().strip().partition(": ")
        if name == "data":
            yield None if value == "[DONE]" else json.loads(value)
            last = time.monotonic()
        elif time.monotonic() - last > SILENCE_SECONDS:
            raise TimeoutError("nothing but comments")
