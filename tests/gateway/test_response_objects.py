"""A node's whole answer, as a response."""

from typing import Any

import orjson
import pytest

from cortex.gateway.dialects.response_objects import Outline, response_of, tokens_of, usage_of
from cortex.gateway.dialects.response_request import decode_request, repeated
from cortex.gateway.dialects.response_tools import offer_of
from cortex.ipc.errors import NodeFailed
from response_schemas import is_response

KEYS = 31
"""How many a strict client wants; and ``user``."""
LS: dict[str, Any] = {
    "type": "function",
    "name": "ls",
    "description": None,
    "parameters": {},
    "strict": True,
}


def outline(**said: Any) -> Outline:
    request = decode_request(orjson.dumps({"model": "m", "input": "hi", **said}))
    offer = offer_of(request.tools or [])
    return Outline("m", repeated(request, offer, is_stored=True), offer, request.wants_summary)


def completion(finish_reason: str = "stop", logprobs: Any = None, **message: Any) -> bytes:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    choice = {"message": message, "finish_reason": finish_reason, "logprobs": logprobs}
    return orjson.dumps({"model": "m", "choices": [choice], "usage": usage})


def call(name: str) -> dict[str, Any]:
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": "{}"}}


def test_a_whole_answer_is_what_strict_clients_expect() -> None:
    told = completion(
        content="Hi", reasoning_content="Hm", tool_calls=[call("ls"), call("agents__spawn")]
    )
    spawn = {"type": "function", "name": "spawn"}
    agents = {"type": "namespace", "name": "agents", "tools": [spawn]}

    response = response_of(told, outline(tools=[LS, agents], reasoning={"summary": "auto"}))

    is_response(response)
    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm"}]
    assert response["output"][3]["namespace"] == "agents"
    assert response["output"][3]["name"] == "spawn"


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"tools": [LS], "tool_choice": {"type": "function", "name": "ls"}},
        {"text": {"format": {"type": "json_object"}}},
        {"reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "max_tool_calls": 3},
    ],
)
def test_whatever_was_asked_the_response_has_every_key(said: dict[str, Any]) -> None:
    response = response_of(completion(content="Hi"), outline(**said))

    is_response(response)
    assert len(response.keys() - {"user"}) == KEYS


def test_a_schema_is_repeated() -> None:
    asked = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}

    response = response_of(completion(content="{}"), outline(text={"format": asked}))

    assert response["text"] == {"format": {**asked, "description": None}}


def test_an_answer_that_the_limit_cut_is_incomplete() -> None:
    told = completion("length", content="Hi", reasoning_content="Hm")

    response = response_of(told, outline())

    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


def test_only_what_is_complete_has_a_time_of_its_end() -> None:
    cut = response_of(completion("length", content="Hi"), outline())
    whole = response_of(completion(content="Hi"), outline())

    assert cut["completed_at"] is None
    assert whole["completed_at"] >= whole["created_at"]


def test_a_call_alone_is_the_whole_output() -> None:
    response = response_of(completion(content=None, tool_calls=[call("ls")]), outline(tools=[LS]))

    assert [item["type"] for item in response["output"]] == ["function_call"]
    assert response["status"] == "completed"


def test_an_answer_without_anything_has_no_output() -> None:
    assert response_of(completion(content=""), outline())["output"] == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}'])
def test_an_answer_that_is_none_is_a_failure_of_the_node(body: bytes) -> None:
    with pytest.raises(NodeFailed, match="not a chat completion"):
        response_of(body, outline())


def test_usage_of_a_node_that_tells_nothing_is_zero() -> None:
    assert usage_of({})["total_tokens"] == 0


def token(text: bytes, logprob: float | None = -0.5) -> dict[str, Any]:
    return {"token": "x", "logprob": logprob, "bytes": list(text), "top_logprobs": []}


def test_the_texts_log_probabilities_come_with_it() -> None:
    tokens = {"content": [token(b"Hm"), token(b"</"), token(b"H"), token(b"i", None)]}
    told = completion(content="Hi", reasoning_content="Hm", logprobs=tokens)

    response = response_of(told, outline(top_logprobs=1))

    part = response["output"][1]["content"][0]
    assert [t["logprob"] for t in part["logprobs"]] == [-0.5, -9999.0]
    is_response(response)


@pytest.mark.parametrize(
    ("text", "pieces", "found"),
    [
        ("Hi", [b"Hi"], [0]),
        ("Hi", [b"Hm", b"Hi", b"<call>"], [1]),
        ("Hi", [b"Hi", b"Hi"], [1]),
        ("é!", [b"\xc3", b"\xa9", b"!"], [0, 1, 2]),
        ("i t", [b"Hi", b" ", b"there"], [0, 1, 2]),
        ("Hi", [b"other"], [0]),
    ],
)
def test_the_tokens_of_a_text_are_found(text: str, pieces: list[bytes], found: list[int]) -> None:
    tokens = [token(piece) for piece in pieces]

    assert tokens_of(text, tokens) == [tokens[index] for index in found]


def test_the_ids_of_the_items_tell_the_response() -> None:
    asked = Outline("m", {}, offer_of([]), key="a" * 32)

    assert asked.id == "resp_" + "a" * 32
    assert asked.item_id("msg", 0) == "msg_" + "a" * 32 + "_0"
