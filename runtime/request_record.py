"""One inference request as it is logged, measured and published when it ends: one line, always."""

from __future__ import annotations

from typing import Any

import msgspec

from cortex.ipc.errors import ApiError

CLIENT_GONE = 499
"""Only ever in logs and metrics: there is nobody left to answer."""


class RequestRecord(msgspec.Struct):
    """What is known so far; ``model`` stays None until the id is known to be one of ours."""

    request_id: str
    arrived: float
    key: str | None = None
    """The id of the client's key, as the gateway says it."""
    model: str | None = None
    status: int = 200
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache; of the first choice."""
    completion_tokens: int = 0
    choices: int = 1
    reasoning_tokens: int = 0
    tool_calls: int = 0
    first_token_seconds: float | None = None
    duration_seconds: float = 0.0
    finish_reason: str | None = None
    """Of the first choice."""
    error: str | None = None

    def refused(self, error: ApiError) -> None:
        """Note that it ended, or never began, with *error*."""
        self.status, self.error, self.finish_reason = error.status, error.code, None

    def gone(self) -> None:
        """Note that the client left."""
        self.status, self.error, self.finish_reason = CLIENT_GONE, "client_gone", None

    def fields(self) -> dict[str, Any]:
        """Return the canonical line: what is known, seconds to the microsecond."""
        fields = msgspec.structs.asdict(self)
        del fields["arrived"]
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in fields.items()
            if value is not None
        }
