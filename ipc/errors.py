"""Errors raised on more than one side of a process or host boundary.

CortexError
├── ProtocolError      the peer sent what is not in the contract, or speaks another version
├── PeerGone           the process at the other end has exited
└── ApiError           an HTTP answer with a code; one subclass per row of the public error table

ApiError               status  code
├── InvalidRequest             400  invalid_request
│   └── GrammarFailed          400  invalid_request
├── MalformedJson              400  malformed_json
├── MissingModelField          400  missing_model_field
├── UnsupportedParameter       400  unsupported_parameter
├── ContextLengthExceeded      400  context_length_exceeded
├── PreviousResponseNotFound   400  previous_response_not_found
├── InvalidApiKey              401  invalid_api_key
├── ModelNotAllowed            403  model_not_allowed
├── OperatorOnly               403  operator_only
├── ForeignPage                403  foreign_origin
├── ModelNotFound              404  model_not_found
├── ResponseNotFound           404  response_not_found
├── RouteNotFound              404  not_found
├── MethodNotAllowed           405  method_not_allowed
├── RequestTimeout             408  request_timeout
├── Conflict                   409  conflict
├── LoadedDifferently          409  loaded_differently
├── PromptTooLongForMemory     413  prompt_too_long_for_memory
├── BodyTooLarge               413  body_too_large
├── UnsupportedEncoding        415  unsupported_encoding
├── ExpectationFailed          417  expectation_failed
├── Unloadable                 422  unloadable
├── RateLimitExceeded          429  rate_limit_exceeded
├── InsufficientQuota          429  insufficient_quota
├── InternalError              500  internal_error
├── NodeFailed                 502  node_failed
├── MalformedToolCall          502  malformed_tool_call
├── Overloaded                 503  overloaded
├── ModelLoading               503  model_loading
├── Recovering                 503  recovering
├── ShuttingDown               503  shutting_down
└── NodeTimeout                504  node_timeout
"""

from __future__ import annotations

from typing import Any


class CortexError(Exception):
    """Base of every error this project raises on purpose."""


class ProtocolError(CortexError):
    """The peer sent something that is not in the contract, or speaks another version."""


class PeerGone(CortexError):
    """The process at the other end has exited."""


class ApiError(CortexError):
    """An HTTP answer with a status and a code that clients may rely on.

    ``param`` names the place in the request; ``retry_after_seconds`` becomes ``Retry-After``;
    ``extras`` are further members of the error object (numbers of a refusal, say).
    """

    status: int = 500
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        extras: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.extras = extras or {}

    @property
    def type(self) -> str:
        """The OpenAI error type that goes with the status."""
        return {
            401: "authentication_error",
            403: "permission_error",
            429: "insufficient_quota" if self.code == "insufficient_quota" else "rate_limit_error",
        }.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return the OpenAI error object."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.extras,
            }
        }


class InvalidRequest(ApiError):
    """The body has the wrong shape or a value out of range."""

    status = 400
    code = "invalid_request"


class GrammarFailed(InvalidRequest):
    """A grammar that was taken, and then could not be enforced to the end of an answer."""


class MalformedJson(ApiError):
    """The body is not JSON."""

    status = 400
    code = "malformed_json"


class MissingModelField(ApiError):
    """The body does not name a model."""

    status = 400
    code = "missing_model_field"


class UnsupportedParameter(ApiError):
    """A parameter that this version cannot honour, and so does not accept."""

    status = 400
    code = "unsupported_parameter"


class ContextLengthExceeded(ApiError):
    """The prompt is longer than the model's context."""

    status = 400
    code = "context_length_exceeded"

    @classmethod
    def of(cls, prompt_tokens: int, maximum_tokens: int) -> ContextLengthExceeded:
        """Return the error with the wording that OpenAI clients match on."""
        return cls(
            f"This model's maximum context length is {maximum_tokens} tokens. "
            f"However, your messages resulted in {prompt_tokens} tokens.",
            param="messages",
            extras={"prompt_tokens": prompt_tokens, "maximum_tokens": maximum_tokens},
        )


class PreviousResponseNotFound(ApiError):
    """What a request goes on from is not stored, or not for this key."""

    status = 400
    code = "previous_response_not_found"


class InvalidApiKey(ApiError):
    """No key, or one that nobody knows."""

    status = 401
    code = "invalid_api_key"


class ModelNotAllowed(ApiError):
    """The key is known but may not use this model."""

    status = 403
    code = "model_not_allowed"


class OperatorOnly(ApiError):
    """The key is known but may not change the fleet."""

    status = 403
    code = "operator_only"


class ForeignPage(ApiError):
    """A web page of somewhere else asks a daemon that needs no key."""

    status = 403
    code = "foreign_origin"


class ModelNotFound(ApiError):
    """Nobody can serve the model."""

    status = 404
    code = "model_not_found"


class ResponseNotFound(ApiError):
    """No such response is stored, or not for this key."""

    status = 404
    code = "response_not_found"


class RouteNotFound(ApiError):
    """There is no such path."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    """The client stopped sending in the middle of its body."""

    status = 408
    code = "request_timeout"


class Conflict(ApiError):
    """The state of the node forbids it now: busy, or not in the right state."""

    status = 409
    code = "conflict"


class LoadedDifferently(ApiError):
    """The model is loaded already, with other settings."""

    status = 409
    code = "loaded_differently"


class PromptTooLongForMemory(ApiError):
    """Fits the context, can never fit the memory."""

    status = 413
    code = "prompt_too_long_for_memory"


class BodyTooLarge(ApiError):
    """The body is larger than what we read."""

    status = 413
    code = "body_too_large"


class UnsupportedEncoding(ApiError):
    """The body is compressed in a way that we do not read."""

    status = 415
    code = "unsupported_encoding"


class ExpectationFailed(ApiError):
    """The ``Expect`` header asks for what no server of HTTP has."""

    status = 417
    code = "expectation_failed"


class Unloadable(ApiError):
    """A load that cannot work, refused before any download or allocation.

    ``kind`` is the machine-readable reason, e.g. ``quant_not_found``; the body carries it too.
    """

    status = 422
    code = "unloadable"

    def __init__(self, message: str, *, kind: str, **extras: Any) -> None:
        super().__init__(message, extras={"kind": kind, **extras})
        self.kind = kind


class RateLimitExceeded(ApiError):
    """A budget window is spent, or the key has too many requests in flight."""

    status = 429
    code = "rate_limit_exceeded"


class InsufficientQuota(ApiError):
    """The balance is spent and does not reset by itself."""

    status = 429
    code = "insufficient_quota"


class InternalError(ApiError):
    """A bug; its text is logged, never shown."""

    status = 500
    code = "internal_error"


class NodeFailed(ApiError):
    """A node, or a device of it, broke while it held the request."""

    status = 502
    code = "node_failed"


class MalformedToolCall(ApiError):
    """The model began to call a tool, in a stream, and its arguments cannot become JSON."""

    status = 502
    code = "malformed_tool_call"


class Overloaded(ApiError):
    """The queue is full."""

    status = 503
    code = "overloaded"


class ModelLoading(ApiError):
    """The model is on its way."""

    status = 503
    code = "model_loading"


class Recovering(ApiError):
    """The model's device is being restarted, or no healthy node is there now."""

    status = 503
    code = "recovering"


class ShuttingDown(ApiError):
    """The daemon is draining; it takes nothing new."""

    status = 503
    code = "shutting_down"


class NodeTimeout(ApiError):
    """A node did not answer in time."""

    status = 504
    code = "node_timeout"
