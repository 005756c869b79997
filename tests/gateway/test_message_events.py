"""A node's answer in Anthropic's words."""

from typing import Any

import orjson
import pytest

from cortex.gateway.dialects.message_events import MessageEvents, message_of, stop_of, usage_of
from cortex.gateway.errors import Relayed
from cortex.ipc.errors import NodeFailed

# What strict clients look for; see reference/clients.md.
USAGE_FIELDS = {
    "cache_creation",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "inference_geo",
    "input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
    "service_tier",
}
MESSAGE_FIELDS = {
    "id",
    "type",
    "role",
    "model",
    "content",
    "stop_reason",
    "stop_sequence",
    "stop_details",
    "container",
    "usage",
}


def chunk(**choice: Any) -> bytes:
    data = {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": None, **choice}]}
    return b"data: " + orjson.dumps(data) + b"\n\n"


ROLE = chunk(delta={"role": "assistant", "content": ""})
FINISH = chunk(finish_reason="stop")
COST = b'{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}'
USAGE = b": usage " + COST + b"\n\n"
DONE = b"data: [DONE]\n\n"


def events_of(*chunks: bytes, prompt_tokens: int = 9) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and data of the events that *chunks* become."""
    translation = MessageEvents("m", prompt_tokens)
    said = b"".join(map(translation.feed, chunks))
    found = []
    for event in said.split(b"\n\n")[:-1]:
        name, data = event.split(b"\n")
        found.append((name.removeprefix(b"event: ").decode(), orjson.loads(data[len("data: ") :])))
    return found


def completion(**choice: Any) -> bytes:
    message = {"role": "assistant", "content": "Hi"}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    choices = [{"message": message, "finish_reason": "stop", **choice}]
    return orjson.dumps({"model": "m", "choices": choices, "usage": usage})


@pytest.mark.parametrize(
    "delta", [{"reasoning_content": "Hm"}, {"tool_calls": [{"index": 0, "function": {}}]}]
)
def test_what_this_dialect_has_no_block_for_yet_keeps_the_stream_alive(
    delta: dict[str, Any],
) -> None:
    text = chunk(delta={"content": "Hi"})

    names = [name for name, _ in events_of(ROLE, chunk(delta=delta), text, FINISH, USAGE, DONE)]

    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-1] == "message_stop"


def test_a_stream_is_told_in_anthropics_order() -> None:
    text = [chunk(delta={"content": word}) for word in ("Hi", " there")]

    events = events_of(ROLE, *text, FINISH, USAGE, DONE)

    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(name == data["type"] for name, data in events)
    assert [data["delta"]["text"] for _, data in events[2:4]] == ["Hi", " there"]


def test_cut_anywhere_the_events_are_the_same() -> None:
    stream = ROLE + chunk(delta={"content": "Hé"}) + b": hi\n\n" + FINISH + USAGE + DONE
    whole = events_of(stream)

    pieces = events_of(*(stream[at : at + 1] for at in range(len(stream))))

    for events in (whole, pieces):
        events[0][1]["message"].pop("id")
    assert pieces == whole


def test_the_first_event_tells_the_tokens_of_the_prompt() -> None:
    (_, start), *_ = events_of(ROLE, prompt_tokens=9)

    assert start["message"].keys() == MESSAGE_FIELDS
    assert start["message"]["usage"]["input_tokens"] == 9
    assert start["message"]["stop_reason"] is None


def test_the_last_event_tells_what_it_cost() -> None:
    *_, (_, delta), _ = events_of(ROLE, FINISH, USAGE, DONE)

    usage = delta["usage"]
    assert usage.keys() == USAGE_FIELDS
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (5, 4)
    assert usage["output_tokens"] == 2


def test_a_keep_alive_becomes_a_ping() -> None:
    events = events_of(ROLE, b": keep-alive\n\n", b": keep-alive\n\n")

    assert [name for name, _ in events] == ["message_start", "ping", "ping"]


def test_an_answer_without_text_has_no_block() -> None:
    names = [name for name, _ in events_of(ROLE, FINISH, USAGE, DONE)]

    assert names == ["message_start", "message_delta", "message_stop"]


def test_a_stream_of_nothing_but_its_end_is_still_whole() -> None:
    assert next(name for name, _ in events_of(DONE)) == "message_start"


def test_a_nodes_error_frame_is_raised() -> None:
    frame = b'data: {"error": {"message": "gone", "code": "overloaded"}}\n\n'

    with pytest.raises(Relayed) as caught:
        events_of(ROLE, frame)

    assert (caught.value.code, caught.value.status) == ("overloaded", 503)


@pytest.mark.parametrize(
    ("choice", "stop"),
    [
        ({"finish_reason": "stop"}, ("end_turn", None)),
        ({"finish_reason": "length"}, ("max_tokens", None)),
        ({"finish_reason": "stop", "stop_reason": "END"}, ("stop_sequence", "END")),
        ({"finish_reason": "stop", "stop_reason": 2}, ("end_turn", None)),
    ],
)
def test_why_it_stopped(choice: dict[str, Any], stop: tuple[str, str | None]) -> None:
    *_, (_, delta), _ = events_of(ROLE, chunk(**choice), USAGE, DONE)

    assert stop_of(choice) == stop
    assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == stop


def test_a_whole_answer_has_every_field() -> None:
    message = message_of(completion(), "m")

    assert message.keys() == MESSAGE_FIELDS
    assert message["usage"].keys() == USAGE_FIELDS
    assert message["content"] == [{"type": "text", "text": "Hi", "citations": None}]
    assert message["id"].startswith("msg_")


def test_a_whole_answer_without_text_has_no_content() -> None:
    assert message_of(completion(message={"content": ""}), "m")["content"] == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}'])
def test_an_answer_that_is_none_is_a_failure_of_the_node(body: bytes) -> None:
    with pytest.raises(NodeFailed, match="not a chat completion"):
        message_of(body, "m")


def test_usage_of_a_node_that_tells_nothing_is_zero() -> None:
    assert usage_of({})["input_tokens"] == 0
