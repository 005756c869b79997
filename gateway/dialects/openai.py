"""OpenAI's envelopes."""

from __future__ import annotations

from typing import Any

from cortex.gateway import sse
from cortex.ipc.errors import ApiError


class OpenAI:
    """Errors as ``{"error": {message, type, param, code}}``, keep-alives as comments."""

    def status(self, error: ApiError) -> int:
        """Return the error's own status."""
        return error.status

    def envelope(self, error: ApiError, request_id: str) -> dict[str, Any]:
        """Return the error object."""
        del request_id  # it is in the header
        return error.body()

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the error object as the last event; no ``[DONE]`` follows."""
        return sse.event(self.envelope(error, request_id))

    def keep_alive(self, text: str) -> bytes:
        """Return a comment."""
        return sse.comment(text)


OPENAI = OpenAI()
