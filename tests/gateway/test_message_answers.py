"""A node's whole answer as Anthropic's message."""

from typing import Any

import orjson
import pytest

from anthropic_schema import faults
from cortex.gateway.dialects.message_answers import Expected, message_of, stop_of, usage_of
from cortex.gateway.dialects.message_thinking import signature_of
from cortex.ipc.errors import MalformedToolCall, NodeFailed

CALL = {"id": "t0", "type": "function", "function": {"name": "Bash", "arguments": '{"n": 1}'}}
USE = {
    "type": "tool_use",
    "id": "t0",
    "name": "Bash",
    "input": {"n": 1},
    "caller": {"type": "direct"},
}


def completion(**choice: Any) -> bytes:
    message = {"role": "assistant", "content": "Hi"}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    choices = [{"message": message, "finish_reason": "stop", **choice}]
    return orjson.dumps({"model": "m", "choices": choices, "usage": usage})


def calling(arguments: str, finish_reason: str = "tool_calls", **more: Any) -> bytes:
    called = {**CALL, "function": {"name": "Bash", "arguments": arguments}}
    said = {"content": None, "tool_calls": [CALL, called]}
    return completion(message=said, finish_reason=finish_reason, **more)


def content_of(body: bytes, **expected: Any) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = message_of(body, Expected("m", **expected))["content"]
    return content


@pytest.mark.parametrize(
    "body",
    [
        completion(),
        completion(message={"content": "Hi", "reasoning_content": "Hm", "tool_calls": [CALL]}),
        completion(finish_reason="length"),
    ],
    ids=["text", "everything", "cut"],
)
@pytest.mark.parametrize("schema", ["Message", "BetaMessage"])
def test_a_whole_answer_is_in_the_published_schema(body: bytes, schema: str) -> None:
    why = {"cache_miss_reason": {"type": "unavailable"}}
    message = message_of(body, Expected("m", max_tokens=99, diagnostics=why))

    assert faults(orjson.loads(orjson.dumps(message)), schema) == []


def test_a_whole_answer_is_a_block_of_text() -> None:
    message = message_of(completion(), Expected("m"))

    assert message["content"] == [{"type": "text", "text": "Hi", "citations": None}]
    assert message["id"].startswith("msg_")
    assert (message["model"], message["stop_reason"]) == ("m", "end_turn")


def test_a_whole_answer_without_text_has_no_content() -> None:
    assert content_of(completion(message={"content": ""})) == []


def test_thinking_text_and_calls_are_blocks() -> None:
    said = {"content": "Hi", "reasoning_content": "Hm", "tool_calls": [CALL]}

    body = completion(message=said, finish_reason="tool_calls")

    assert content_of(body) == [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "text", "text": "Hi", "citations": None},
        USE,
    ]
    assert message_of(body, Expected("m"))["stop_reason"] == "tool_use"


def test_thinking_that_is_to_be_omitted_comes_in_the_signature() -> None:
    body = completion(message={"content": "Hi", "reasoning_content": "Hm"})

    thinking, _ = content_of(body, omits_thinking=True)

    assert thinking == {"type": "thinking", "thinking": "", "signature": signature_of("Hm")}


@pytest.mark.parametrize("arguments", ["{}", ""])
def test_a_call_without_arguments_has_an_empty_input(arguments: str) -> None:
    assert [use["input"] for use in content_of(calling(arguments))] == [{"n": 1}, {}]


def test_large_numbers_in_arguments_stay_what_they_are() -> None:
    assert content_of(calling(f'{{"n": {2**70}}}'))[1]["input"] == {"n": 2**70}


@pytest.mark.parametrize("arguments", ['{"comma', "", "[1"])
@pytest.mark.parametrize("finish", [("length", None), ("stop", "END")])
def test_a_call_that_was_cut_is_left_out(arguments: str, finish: tuple[str, Any]) -> None:
    body = calling(arguments, finish[0], stop_reason=finish[1])

    assert content_of(body) == [USE]


@pytest.mark.parametrize("arguments", ['{"comma', "[1]", "yes"])
def test_a_whole_call_that_is_no_object_is_an_error(arguments: str) -> None:
    with pytest.raises(MalformedToolCall):
        content_of(calling(arguments))


@pytest.mark.parametrize(
    ("choice", "completion_tokens", "has_calls", "stop"),
    [
        ({"finish_reason": "stop"}, 2, False, ("end_turn", None)),
        ({"finish_reason": "stop"}, 2, True, ("tool_use", None)),
        ({"finish_reason": "tool_calls"}, 2, True, ("tool_use", None)),
        ({"finish_reason": "length"}, 9, False, ("max_tokens", None)),
        ({"finish_reason": "length"}, 9, True, ("max_tokens", None)),
        ({"finish_reason": "length"}, 8, False, ("model_context_window_exceeded", None)),
        (
            {"finish_reason": "length", "stop_reason": "context_length"},
            9,
            False,
            ("model_context_window_exceeded", None),
        ),
        ({"finish_reason": "content_filter"}, 2, False, ("refusal", None)),
        ({"finish_reason": "stop", "stop_reason": "END"}, 2, False, ("stop_sequence", "END")),
        ({"finish_reason": "stop", "stop_reason": "END"}, 2, True, ("stop_sequence", "END")),
        ({"finish_reason": "tool_calls", "stop_reason": "END"}, 2, True, ("tool_use", None)),
        ({"finish_reason": "stop", "stop_reason": 2}, 2, False, ("end_turn", None)),
        ({}, 0, False, ("end_turn", None)),
    ],
    ids=str,
)
def test_why_it_stopped(
    choice: dict[str, Any], completion_tokens: int, has_calls: bool, stop: tuple[str, str | None]
) -> None:
    usage = {"completion_tokens": completion_tokens}

    said = stop_of(choice, usage, 9, has_calls=has_calls)

    assert (said["stop_reason"], said["stop_sequence"]) == stop


def test_an_answer_of_no_tokens_that_were_asked_for_has_reached_its_limit() -> None:
    said = stop_of({"finish_reason": "length"}, {"completion_tokens": 0}, 0, has_calls=False)

    assert said["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [3]}'])
def test_an_answer_that_is_none_is_a_failure_of_the_node(body: bytes) -> None:
    with pytest.raises(NodeFailed, match="not a chat completion"):
        message_of(body, Expected("m"))


def test_usage_tells_what_was_computed_what_was_cached_and_what_was_thought() -> None:
    usage = usage_of(
        {
            "prompt_tokens": 9,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3},
        }
    )

    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (5, 4)
    assert (usage["cache_creation_input_tokens"], usage["output_tokens"]) == (0, 7)
    assert usage["output_tokens_details"] == {"thinking_tokens": 3}


def test_usage_of_a_node_that_tells_nothing_is_zero() -> None:
    assert usage_of({})["input_tokens"] == 0
    assert usage_of({})["output_tokens_details"] is None
