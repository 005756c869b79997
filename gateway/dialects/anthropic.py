"""Anthropic's envelopes.

    status 400 413 422 and other 4xx    invalid_request_error (413: request_too_large)
    401 403 404 429                     authentication, permission, not_found, rate_limit
    503 with code overloaded            529 overloaded_error
    504                                 timeout_error
    other 5xx                           api_error

Claude Code reacts to the very words ``prompt is too long: N tokens > M maximum``.
"""

from __future__ import annotations

from typing import Any

from cortex.gateway import sse
from cortex.ipc.errors import ApiError

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


class Anthropic:
    """Errors as ``{"type": "error", "error": {type, message}, "request_id"}``."""

    def status(self, error: ApiError) -> int:
        """Return the error's status; what is overloaded is 529 here."""
        return 529 if error.code == "overloaded" else error.status

    def envelope(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """Return the error; our code and place are kept beside Anthropic's fields."""
        status = self.status(error)
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        said = {"type": kind, "message": _message(error), "code": error.code, "param": error.param}
        return {"type": "error", "error": {**said, **error.extras}, "request_id": request_id}

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the ``error`` event."""
        return sse.event(self.envelope(error, request_id), "error")

    def keep_alive(self, text: str) -> bytes:
        """Return a ``ping``, which has no room for *text*."""
        del text
        return PING


def _message(error: ApiError) -> str:
    prompt, maximum = (error.extras.get(name) for name in ("prompt_tokens", "maximum_tokens"))
    if error.code == "context_length_exceeded" and prompt is not None and maximum is not None:
        return f"prompt is too long: {prompt} tokens > {maximum} maximum"
    return str(error)


ANTHROPIC = Anthropic()
