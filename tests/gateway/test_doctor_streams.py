"""What upsets the clients of each dialect in a stream, the doctor sees, and says it in words."""

from typing import Any

import pytest

from cortex.gateway.doctor_check import NotPossible, Wrong
from cortex.gateway.doctor_streams import accepted, arguments_in, chat_of, message_of, response_of
from cortex.gateway.doctor_wire import Event, Reply

Json = dict[str, Any]
ERROR = {"error": {"message": "the device has died"}}


def chunk(*choices: Json, **more: Any) -> Event:
    return Event(None, {"object": "chat.completion.chunk", "choices": [*choices], **more})


def delta(finish: str | None = None, **said: Any) -> Json:
    return {"index": 0, "delta": said, "finish_reason": finish}


def call(index: int, arguments: str, call_id: str | None = None, name: str | None = None) -> Json:
    return {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}


def named(kind: str, **data: Any) -> Event:
    return Event(kind, {"type": kind, **data})


SAYS = chunk(delta(content="Pa"))
ENDS = chunk(delta("stop", content="ris"))
USAGE = chunk(usage={"total_tokens": 9})

START = named("message_start", message={"usage": {"input_tokens": 7}})
OPEN = named("content_block_start", index=0, content_block={"type": "text"})
ADD = named("content_block_delta", index=0, delta={"type": "text_delta", "text": "Paris"})
CLOSE = named("content_block_stop", index=0)
DELTA = named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2})
STOP = named("message_stop")
PING = named("ping")

RESPONSE = {
    "status": "completed",
    "usage": None,
    "output": [
        {"type": "message", "content": [{"text": "Paris"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "reasoning"},
    ],
}
CREATED = named("response.created", sequence_number=0)
COMPLETED = named("response.completed", sequence_number=1, response=RESPONSE)


def test_a_chat_stream_is_put_together() -> None:
    begins = chunk(delta(tool_calls=[call(0, "", "c1", "f")]))
    goes_on = chunk(delta(tool_calls=[call(0, '{"a":'), call(1, "{}", "c2", "g")]))
    ends = chunk(delta("tool_calls", tool_calls=[call(0, "1}")]))

    whole = chat_of(
        Reply(200, events=[SAYS, begins, goes_on, ends, USAGE], is_done=True), wants_usage=True
    )

    assert (whole.text, whole.finish, whole.usage["total_tokens"]) == ("Pa", "tool_calls", 9)
    assert whole.call_of("f") == ("c1", {"a": 1})
    assert whole.call_of("g") == ("c2", {})
    with pytest.raises(Wrong, match="'h' that was demanded did not come"):
        whole.call_of("h")


@pytest.mark.parametrize(
    ("events", "is_done", "why"),
    [
        ([], True, "no chunk came"),
        ([SAYS, ENDS, USAGE], False, r"without \[DONE\]"),
        ([SAYS, USAGE], True, "no chunk has a finish_reason"),
        ([SAYS, ENDS], True, "no usage came"),
        ([SAYS, USAGE, ENDS], True, "not in a chunk of its own"),
        ([Event(None, {"object": "text_completion"})], True, "of another object"),
        ([SAYS, Event(None, ERROR)], False, "broke off: the device has died"),
        ([chunk(delta(tool_calls=[call(0, "")]))], True, "without an id"),
        ([chunk(delta(tool_calls=[call(1, "", "c", "f")]))], True, "before it begins"),
        ([chunk(delta(tool_calls=[call(-1, "", "c", "f")]))], True, "before it begins"),
    ],
)
def test_what_is_wrong_with_a_chat_stream_is_said(
    events: list[Event], is_done: bool, why: str
) -> None:
    with pytest.raises(Wrong, match=why):
        chat_of(Reply(200, events=events, is_done=is_done), wants_usage=True)


def test_a_message_stream_is_put_together() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "f"}
    calls = [
        named("content_block_start", index=1, content_block=use),
        named("content_block_delta", index=1, delta={"partial_json": '{"a":'}),
        named("content_block_delta", index=1, delta={"partial_json": "1}"}),
        named("content_block_stop", index=1),
    ]

    whole = message_of(Reply(200, events=[START, PING, OPEN, ADD, CLOSE, *calls, DELTA, STOP]))

    assert (whole.text, whole.finish) == ("Paris", "end_turn")
    assert whole.usage == {"input_tokens": 7, "output_tokens": 2}
    assert whole.call_of("f") == ("t1", {"a": 1})


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([], "the first event is not message_start"),
        ([OPEN, DELTA, STOP], "the first event is not message_start"),
        ([START, STOP], "no such end"),
        ([START, OPEN, DELTA, STOP], "a block is left open"),
        ([START, OPEN, OPEN, DELTA, STOP], "before the last one is closed"),
        ([START, OPEN, CLOSE, OPEN, DELTA, STOP], "have gaps"),
        ([START, ADD, DELTA, STOP], "something is added to no block"),
        ([START, CLOSE, DELTA, STOP], "a block is closed that is not open"),
        (
            [START, OPEN, named("content_block_delta", index=3, delta={}), DELTA, STOP],
            "to a block that is not open",
        ),
        ([START, named("message_delta", delta={}), STOP], "without a stop_reason"),
        ([START, Event("ping", {"type": "message_stop"})], "is called 'ping'"),
        ([START, named("error", **ERROR)], "broke off: the device has died"),
    ],
)
def test_what_is_wrong_with_a_message_stream_is_said(events: list[Event], why: str) -> None:
    with pytest.raises(Wrong, match=why):
        message_of(Reply(200, events=events))


def test_a_stream_of_responses_is_put_together() -> None:
    whole = response_of(Reply(200, events=[CREATED, COMPLETED]))

    assert (whole.text, whole.finish, whole.usage) == ("Paris", "completed", {})
    assert whole.call_of("f") == ("c", {})


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([], "no event came"),
        ([CREATED, CREATED], "have gaps"),
        ([named("response.in_progress", sequence_number=0)], "response.created is not the first"),
        ([CREATED], "the last event is 'response.created'"),
        ([Event("x", {"type": "response.created", "sequence_number": 0})], "is called 'x'"),
        (
            [CREATED, named("response.failed", sequence_number=1, response=ERROR)],
            "broke off: the device has died",
        ),
    ],
)
def test_what_is_wrong_with_a_stream_of_responses_is_said(events: list[Event], why: str) -> None:
    with pytest.raises(Wrong, match=why):
        response_of(Reply(200, events=events))


@pytest.mark.parametrize(
    ("body", "error", "why"),
    [
        (b'{"error": {"code": "unsupported_parameter", "message": "no"}}', NotPossible, "^no$"),
        (b'{"error": {"code": "invalid_request", "message": "no"}}', Wrong, "^400: no$"),
        (b'{"error": "no"}', Wrong, '^400: {"error": "no"}$'),
        (b"<html>", Wrong, "^400: <html>$"),
        (b"[]", Wrong, r"^400: \[\]$"),
    ],
)
def test_only_what_is_refused_in_words_is_not_possible(
    body: bytes, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        accepted(Reply(400, body=body))


@pytest.mark.parametrize("text", ["{", "[1]", "", "null"])
def test_arguments_must_be_an_object(text: str) -> None:
    with pytest.raises(Wrong, match="the arguments of a call are no "):
        arguments_in(text)
