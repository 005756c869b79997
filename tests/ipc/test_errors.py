"""Every public error is in the table of its module, and has the shape that clients read."""

import pytest

from cortex.ipc import errors

IN_THE_TABLE = [e for e in errors.ApiError.__subclasses__() if e.__module__ == errors.__name__]


@pytest.mark.parametrize("error", IN_THE_TABLE, ids=lambda e: e.__name__)
def test_every_error_is_in_the_module_docstring(error: type[errors.ApiError]) -> None:
    assert errors.__doc__ is not None
    line = next(ln for ln in errors.__doc__.splitlines() if f" {error.__name__} " in ln)

    assert line.split()[-2:] == [str(error.status), error.code]


def test_an_error_is_the_openai_object() -> None:
    error = errors.Overloaded("the queue is full", param="model", extras={"queue_depth": 8})

    assert error.body() == {
        "error": {
            "message": "the queue is full",
            "type": "server_error",
            "param": "model",
            "code": "overloaded",
            "queue_depth": 8,
        }
    }


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (errors.InvalidRequest("x"), "invalid_request_error"),
        (errors.InvalidApiKey("x"), "authentication_error"),
        (errors.ModelNotAllowed("x"), "permission_error"),
        (errors.RateLimitExceeded("x"), "rate_limit_error"),
        (errors.InsufficientQuota("x"), "insufficient_quota"),
        (errors.NodeFailed("x"), "server_error"),
    ],
)
def test_the_type_follows_the_status(error: errors.ApiError, type_: str) -> None:
    assert error.type == type_


def test_a_prompt_over_the_context_says_both_numbers() -> None:
    error = errors.ContextLengthExceeded.of(9000, 8192)

    assert "maximum context length is 8192 tokens" in str(error)
    assert error.extras == {"prompt_tokens": 9000, "maximum_tokens": 8192}


def test_a_load_that_cannot_work_says_its_kind() -> None:
    error = errors.Unloadable("no Q5", kind="quant_not_found", available=["Q4_1"])

    assert error.body()["error"]["kind"] == "quant_not_found"
    assert error.body()["error"]["available"] == ["Q4_1"]
