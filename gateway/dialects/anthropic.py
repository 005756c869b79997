"""Anthropic's envelopes.

    status 400 413 422 and other 4xx    invalid_request_error (413: request_too_large)
    401 403 404 429                     authentication, permission, not_found, rate_limit
    503 with code overloaded            529 overloaded_error
    504                                 timeout_error
    other 5xx                           api_error

    429 insufficient_quota              billing_error

Claude Code reacts to the very words ``prompt is too long: N tokens > M maximum`` (it compacts the
conversation) and ``input length and `max_tokens` exceed context limit: A + B > C`` (it asks for
less). Nodes tell the numbers; a neuron never refuses for ``max_tokens``, which it cuts.

Versions of the API differ in nothing that is served here, so every date is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cortex.gateway import sse
from cortex.ipc.errors import ApiError, InvalidRequest

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
PING = sse.event({"type": "ping"}, "ping")
VERSION = re.compile(r"\d{4}-\d{2}-\d{2}")

OVERFLOWS = frozenset({"context_length_exceeded", "prompt_too_long_for_memory"})
TOO_LONG = "prompt is too long: {prompt} tokens > {limit} maximum"
NO_ROOM = "input length and `max_tokens` exceed context limit: {prompt} + {answer} > {limit}"


class Anthropic:
    """Errors as ``{"type": "error", "error": {type, message}, "request_id"}``."""

    def status(self, error: ApiError) -> int:
        """Return the error's status; what is overloaded is 529 here."""
        return 529 if error.code == "overloaded" else error.status

    def envelope(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """Return the error; our code and place are kept beside Anthropic's fields."""
        status = self.status(error)
        kind = _kind(error, status)
        said = {"type": kind, "message": _message(error), "code": error.code, "param": error.param}
        return {"type": "error", "error": {**said, **error.extras}, "request_id": request_id}

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the ``error`` event."""
        return sse.event(self.envelope(error, request_id), "error")

    def keep_alive(self, text: str) -> bytes:
        """Return a ``ping``, which has no room for *text*."""
        del text
        return PING


def check_version(headers: Mapping[str, str]) -> None:
    """Raise InvalidRequest for an ``anthropic-version`` that is none; none at all will do."""
    version = headers.get("anthropic-version", "2023-06-01")
    if not VERSION.fullmatch(version):
        raise InvalidRequest(
            f"anthropic-version: {version!r} is no version: it is a date, such as 2023-06-01",
            param="anthropic-version",
        )


def _kind(error: ApiError, status: int) -> str:
    if error.code == "insufficient_quota":
        return "billing_error"
    return TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def _message(error: ApiError) -> str:
    prompt = error.extras.get("prompt_tokens")
    limit = error.extras.get("maximum_tokens") or error.extras.get("cache_tokens")
    if error.code not in OVERFLOWS or prompt is None or limit is None:
        return str(error)
    answer = error.extras.get("answer_tokens")
    has_room = answer is not None and prompt < limit
    return (NO_ROOM if has_room else TOO_LONG).format(prompt=prompt, answer=answer, limit=limit)


ANTHROPIC = Anthropic()
