"""How failures look to a client, in each dialect."""

from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from cortex.gateway.dialects.anthropic import ANTHROPIC
from cortex.gateway.dialects.openai import OPENAI
from cortex.gateway.errors import Relayed, errors_in_dialect
from cortex.gateway.request_id import identify, name_the_answer
from cortex.ipc import errors
from cortex.ipc.errors import ApiError, ContextLengthExceeded, Overloaded, Unloadable

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
# The error table of DESIGN section 7: status, code, Anthropic's status and type.
TABLE = [
    (errors.MalformedJson, 400, "malformed_json", 400, "invalid_request_error"),
    (errors.InvalidRequest, 400, "invalid_request", 400, "invalid_request_error"),
    (errors.GrammarFailed, 400, "invalid_request", 400, "invalid_request_error"),
    (errors.MissingModelField, 400, "missing_model_field", 400, "invalid_request_error"),
    (errors.UnsupportedParameter, 400, "unsupported_parameter", 400, "invalid_request_error"),
    (errors.ContextLengthExceeded, 400, "context_length_exceeded", 400, "invalid_request_error"),
    (
        errors.PreviousResponseNotFound,
        *(400, "previous_response_not_found"),
        *(400, "invalid_request_error"),
    ),
    (errors.PromptTooLongForMemory, 413, "prompt_too_long_for_memory", 413, "request_too_large"),
    (errors.BodyTooLarge, 413, "body_too_large", 413, "request_too_large"),
    (errors.InvalidApiKey, 401, "invalid_api_key", 401, "authentication_error"),
    (errors.ModelNotAllowed, 403, "model_not_allowed", 403, "permission_error"),
    (errors.OperatorOnly, 403, "operator_only", 403, "permission_error"),
    (errors.ForeignPage, 403, "foreign_origin", 403, "permission_error"),
    (errors.ModelNotFound, 404, "model_not_found", 404, "not_found_error"),
    (errors.ResponseNotFound, 404, "response_not_found", 404, "not_found_error"),
    (errors.RouteNotFound, 404, "not_found", 404, "not_found_error"),
    (errors.MethodNotAllowed, 405, "method_not_allowed", 405, "invalid_request_error"),
    (errors.RequestTimeout, 408, "request_timeout", 408, "invalid_request_error"),
    (errors.Conflict, 409, "conflict", 409, "invalid_request_error"),
    (errors.LoadedDifferently, 409, "loaded_differently", 409, "invalid_request_error"),
    (errors.UnsupportedEncoding, 415, "unsupported_encoding", 415, "invalid_request_error"),
    (errors.ExpectationFailed, 417, "expectation_failed", 417, "invalid_request_error"),
    (errors.RateLimitExceeded, 429, "rate_limit_exceeded", 429, "rate_limit_error"),
    (errors.InsufficientQuota, 429, "insufficient_quota", 429, "billing_error"),
    (errors.InternalError, 500, "internal_error", 500, "api_error"),
    (errors.NodeFailed, 502, "node_failed", 502, "api_error"),
    (errors.MalformedToolCall, 502, "malformed_tool_call", 502, "api_error"),
    (errors.Overloaded, 503, "overloaded", 529, "overloaded_error"),
    (errors.ModelLoading, 503, "model_loading", 503, "api_error"),
    (errors.Recovering, 503, "recovering", 503, "api_error"),
    (errors.ShuttingDown, 503, "shutting_down", 503, "api_error"),
    (errors.NodeTimeout, 504, "node_timeout", 504, "timeout_error"),
]
ROWS = pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].__name__)


async def answer_to(
    error: Exception, path: str = CHAT, **headers: str
) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Return status, body and headers of a handler that raises *error*."""

    async def handler(_: web.Request) -> web.Response:
        raise error

    app = web.Application(middlewares=[identify, errors_in_dialect])
    app.on_response_prepare.append(name_the_answer)
    app.router.add_get(path, handler)
    async with (
        TestClient(TestServer(app)) as client,
        client.get(path, headers=headers) as response,
    ):
        return response.status, await response.json(), response.headers


def test_every_error_of_both_sides_is_in_the_table() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    public = {k for k in kinds if issubclass(k, ApiError) and k is not ApiError}

    assert public - {row[0] for row in TABLE} == {Unloadable}  # has its own test: it takes a kind


@ROWS
async def test_an_error_in_openais_envelope(row: tuple[Any, ...]) -> None:
    kind, status, code, *_ = row

    answered, body, _ = await answer_to(kind("in words", param="here"))

    assert answered == status
    assert body["error"]["message"] == "in words"
    assert (body["error"]["code"], body["error"]["param"]) == (code, "here")
    assert body["error"]["type"]


@ROWS
async def test_an_error_in_anthropics_envelope(row: tuple[Any, ...]) -> None:
    kind, _, code, status, name = row

    answered, body, headers = await answer_to(kind("in words"), MESSAGES)

    assert answered == status
    assert (body["type"], body["error"]["type"]) == ("error", name)
    assert (body["error"]["message"], body["error"]["code"]) == ("in words", code)
    assert body["request_id"] == headers["request-id"]


async def test_a_refused_load_tells_its_kind() -> None:
    status, body, _ = await answer_to(Unloadable("too large", kind="no_memory", need_mb=9))

    assert (status, body["error"]["kind"], body["error"]["need_mb"]) == (422, "no_memory", 9)


async def test_when_to_come_back_is_in_the_header() -> None:
    _, _, headers = await answer_to(Overloaded("full", retry_after_seconds=7))

    assert headers["Retry-After"] == "7"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_every_503_says_when_to_come_back(path: str) -> None:
    _, _, headers = await answer_to(Overloaded("full"), path)

    assert headers["Retry-After"] == "1"


async def test_a_bug_does_not_leak_its_message() -> None:
    status, body, _ = await answer_to(RuntimeError("a secret path"))

    assert status == 500
    assert "secret" not in str(body)


async def test_an_odd_http_error_keeps_the_envelope() -> None:
    status, body, _ = await answer_to(web.HTTPExpectationFailed(), MESSAGES)

    assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_who_refused_is_in_a_header() -> None:
    _, _, ours = await answer_to(Overloaded("full"))
    _, _, theirs = await answer_to(Relayed(503, "overloaded", "full"))

    assert (ours["x-cortex-source"], theirs["x-cortex-source"]) == ("gateway", "node")


async def test_the_clients_request_id_is_kept() -> None:
    _, _, headers = await answer_to(Overloaded("full"), CHAT, **{"x-request-id": "mine-1"})

    assert headers["x-request-id"] == headers["request-id"] == "mine-1"


async def test_a_request_id_that_is_not_sane_is_replaced() -> None:
    _, _, headers = await answer_to(Overloaded("full"), CHAT, **{"x-request-id": "a b" * 99})

    assert headers["x-request-id"].startswith("req_")


async def test_models_are_in_the_dialect_of_the_version_header() -> None:
    headers = {"anthropic-version": "2023-06-01"}

    _, body, _ = await answer_to(Overloaded("full"), "/v1/models", **headers)

    assert body["type"] == "error"


def test_a_prompt_that_is_too_long_has_the_words_that_claude_code_knows() -> None:
    body = ANTHROPIC.envelope(ContextLengthExceeded.of(9000, 8192), "r")

    assert body["error"]["message"] == "prompt is too long: 9000 tokens > 8192 maximum"


def test_an_error_frame_is_one_event_of_its_dialect() -> None:
    error = errors.NodeFailed("gone")

    assert OPENAI.error_frame(error, "r").startswith(b'data: {"error":{"message":"gone"')
    assert ANTHROPIC.error_frame(error, "r").startswith(b'event: error\ndata: {"type":"error"')


def test_what_a_node_says_is_kept() -> None:
    said = {"message": "m", "type": "t", "param": "p", "code": "overloaded", "queued": 3}

    error = Relayed.of(503, said, "4")

    assert (error.status, error.code, str(error), error.param) == (503, "overloaded", "m", "p")
    assert (error.retry_after_seconds, error.extras) == (4, {"queued": 3})


@pytest.mark.parametrize(
    ("code", "status"), [("model_loading", 503), ("node_timeout", 504), ("never heard of", 502)]
)
def test_an_error_frame_of_a_node_gets_the_status_of_its_code(code: str, status: int) -> None:
    assert Relayed.of(None, {"message": "m", "code": code}).status == status


@pytest.mark.parametrize("seconds", ["soon", "-1", "1.5", "\N{SUPERSCRIPT TWO}", "9" * 5000])
def test_when_to_come_back_is_left_out_where_it_is_no_number(seconds: str) -> None:
    assert Relayed.of(503, {}, seconds).retry_after_seconds is None


def test_a_node_that_gives_no_reason_is_forgiven() -> None:
    error = Relayed.of(500, {}, "soon", otherwise="no reason")

    assert (error.code, str(error), error.retry_after_seconds) == ("node_failed", "no reason", None)
