"""What engines refuse with becomes an error of ours, whatever its shape; all of it pure."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.gateway.dialects.anthropic import ANTHROPIC
from cortex.gateway.engine_errors import failure, refusal
from cortex.ipc.errors import ApiError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["error", "message", "detail", "object", "code", "param", "loc", "msg"])
SHAPES = st.recursive(
    JSON, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8
)


def refused(status: int, body: Any, **more: Any) -> ApiError:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return refusal("ray", status, raw, **more)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "bad", "type": "BadRequestError", "param": None, "code": 400}},
        {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400},
        {"error": "bad"},
        {"detail": "bad"},
        {"detail": {"message": "bad"}},
        {"message": "bad"},
        b"bad",
    ],
    ids=["openai", "vllm", "ollama", "fastapi", "nested", "bare", "text"],
)
def test_a_refusal_is_understood_in_every_shape(body: Any) -> None:
    error = refused(400, body)

    assert (error.status, error.code, str(error)) == (400, "invalid_request", "bad")


def test_places_that_fastapi_names_are_named() -> None:
    wrong = {"loc": ["body", "messages", 0, "role"], "msg": "field required", "type": "missing"}

    error = refused(422, {"detail": [wrong]})

    assert (error.status, error.param) == (422, "messages.0.role")
    assert str(error) == "messages.0.role: field required"


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><html>nginx</html>",
        b"",
        [],
        {},
        {"detail": []},
        {"error": {"message": 'Traceback (most recent call last):\n File "x.py"'}},
    ],
    ids=["html", "nothing", "array", "object", "no-detail", "traceback"],
)
def test_what_has_no_words_for_a_client_gets_ours(body: Any) -> None:
    assert str(refused(400, body)) == "node ray refused this and gave no reason"
    assert str(refused(500, body)) == "node ray failed"


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_wrong_is_ours(status: int) -> None:
    error = refused(status, {"error": "Unauthorized"})

    assert (error.status, error.code) == (502, "node_failed")
    assert str(error) == "node ray wants another key: set key_file of this engine"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"error": {"message": "The model `m` does not exist.", "code": 404}}),
        (404, {"object": "error", "message": "The model `m` does not exist."}),
        (404, {"error": {"message": 'model "m" not found, try pulling it first'}}),
        (400, {"error": {"message": "no m", "code": "model_not_found"}}),
    ],
)
def test_a_model_that_is_not_there_is_not_found(status: int, body: Any) -> None:
    error = refused(status, body)

    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize("body", [{"detail": "Not Found"}, b"404 page not found"])
def test_a_path_that_is_not_there_is_said_not_to_be(body: Any) -> None:
    error = refused(404, body, path="/v1/embeddings")

    assert (error.status, error.code) == (404, "not_found")
    assert str(error) == "node ray does not serve /v1/embeddings"


@pytest.mark.parametrize(
    ("status", "words", "code", "becomes"),
    [
        (429, "too many requests", "overloaded", 503),
        (503, "no room", "overloaded", 503),
        (503, "Loading model", "model_loading", 503),
        (504, "upstream timed out", "node_timeout", 504),
        (408, "slow", "node_timeout", 504),
        (500, "CUDA error", "node_failed", 502),
        (502, "bad gateway", "node_failed", 502),
    ],
)
def test_what_is_the_engines_fault_is_said_of_it(
    status: int, words: str, code: str, becomes: int
) -> None:
    error = refused(status, {"error": {"message": words}})

    assert (error.status, error.code) == (becomes, code)
    assert str(error).startswith("node ray ")
    assert str(error).endswith(words)


@pytest.mark.parametrize(("told", "seconds"), [("7", 7), (None, 1), ("tomorrow", 1)])
def test_whoever_is_turned_away_is_told_when_to_come_back(told: str | None, seconds: int) -> None:
    assert refused(429, {}, retry_after=told).retry_after_seconds == seconds


@pytest.mark.parametrize(
    "words",
    [
        (
            "This model's maximum context length is 8192 tokens. However, you requested "
            "9010 tokens "
            "(9000 in the messages, 10 in the completion). Please reduce the length."
        ),
        (
            "This model's maximum context length is 8192 tokens, however you requested 9010 tokens "
            "(9000 in your prompt; 10 for the completion). Please reduce your prompt."
        ),
        (
            "This model's maximum context length is 8192 tokens. However, your request has "
            "9000 input "
            "tokens. Please reduce the length of the input messages."
        ),
        (
            "You passed 9000 input tokens and requested 10 output tokens. However, the "
            "model's context "
            "length is only 8192 tokens, resulting in a maximum input length of 8182 tokens."
        ),
        "The decoder prompt (length 9000) is longer than the maximum model length of 8192.",
        "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
        (
            "Requested token count exceeds the model's maximum context length of 8192 tokens. You "
            "requested a total of 9010 tokens: 9000 tokens from the input messages and 10 "
            "tokens for "
            "the completion."
        ),
        "request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it",
        "Requested tokens (9000) exceed context window of 8192",
    ],
)
def test_a_prompt_that_is_too_long_is_said_with_its_numbers(words: str) -> None:
    error = refused(400, {"error": {"message": words}})

    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert ANTHROPIC.envelope(error, "r")["error"]["message"] == (
        "prompt is too long: 9000 tokens > 8192 maximum"
    )


@pytest.mark.parametrize(
    "words",
    [
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's "
            "maximum context "
            "length is 8192 tokens and your request has 12 input tokens (32000 > 8192 - 12)."
        ),
        (
            "This model's maximum context length is 8192 tokens. However, you requested "
            "32012 tokens "
            "(12 in the messages, 32000 in the completion)."
        ),
        (
            "You passed 12 input tokens and requested 32000 output tokens. However, the model's "
            "context length is only 8192 tokens, resulting in a maximum input length of 0 tokens."
        ),
    ],
)
def test_an_answer_that_has_no_room_is_said_with_its_numbers(words: str) -> None:
    error = refused(400, {"error": {"message": words}})

    assert ANTHROPIC.envelope(error, "r")["error"]["message"] == (
        "input length and `max_tokens` exceed context limit: 12 + 32000 > 8192"
    )


def test_numbers_that_stand_beside_the_words_are_read() -> None:
    told = {"message": "it exceeds the available context size", "n_prompt_tokens": 9, "n_ctx": 8}

    error = refused(400, {"error": told})

    assert error.extras == {"prompt_tokens": 9, "maximum_tokens": 8}


def test_a_prompt_that_is_too_long_without_numbers_is_still_that() -> None:
    error = refused(400, {"error": {"code": "context_length_exceeded"}})

    assert (error.code, error.extras) == ("context_length_exceeded", {})


def test_an_error_in_a_stream_has_its_status_in_its_code() -> None:
    assert failure("ray", {"message": "bad", "code": 400}).code == "invalid_request"
    assert failure("ray", {"message": "bad"}).code == "node_failed"


@given(status=st.integers(400, 599), body=SHAPES, retry_after=st.none() | st.text())
def test_whatever_an_engine_refuses_with_is_an_error_of_ours(
    status: int, body: Any, retry_after: str | None
) -> None:
    error = refused(status, body, retry_after=retry_after)

    assert 400 <= error.status < 600
    assert str(error)
    orjson.dumps(error.body())
