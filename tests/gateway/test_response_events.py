"""A node's chat stream as the events of a response."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from cortex.gateway.dialects.response_events import (
    KEEP_ALIVES_PER_EVENT,
    Numbered,
    ResponseEvents,
)
from cortex.gateway.dialects.response_objects import Outline
from cortex.gateway.dialects.response_tools import offer_of
from cortex.gateway.errors import Relayed
from cortex.ipc.errors import NodeFailed
from response_schemas import is_event, is_response

Event = dict[str, Any]

AGENTS = {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "spawn"}]}
REPEATED: dict[str, Any] = {
    "previous_response_id": None,
    "instructions": None,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "max_tool_calls": None,
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": None, "summary": None},
    "temperature": 1.0,
    "top_p": 1.0,
    "top_logprobs": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_output_tokens": None,
    "truncation": "disabled",
    "store": True,
    "background": False,
    "service_tier": "default",
    "metadata": {},
    "prompt_cache_key": None,
    "safety_identifier": None,
    "user": None,
}
KEY = "0" * 32


def outline(*, wants_summary: bool = False) -> Outline:
    return Outline("m", REPEATED, offer_of([AGENTS]), wants_summary, KEY, created_at=1)


def chunk(delta: dict[str, Any], **choice: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": None, **choice}]
    return b"data: " + orjson.dumps({"model": "m", "choices": choices}) + b"\n\n"


def says(text: str, **choice: Any) -> bytes:
    return chunk({"content": text}, **choice)


def thinks(text: str) -> bytes:
    return chunk({"reasoning_content": text})


def calls(index: int, name: str) -> bytes:
    function = {"name": name, "arguments": ""}
    call = {"index": index, "id": f"call_{index}", "type": "function", "function": function}
    return chunk({"tool_calls": [call]})


def argues(index: int, text: str) -> bytes:
    return chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})


ROLE = chunk({"role": "assistant", "content": ""})
STOP = chunk({}, finish_reason="stop")
LENGTH = chunk({}, finish_reason="length")
COST = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 5},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
USAGE = b": usage " + orjson.dumps(COST) + b"\n\n"
DONE = b"data: [DONE]\n\n"
STILL = b": keep-alive\n\n"
EVERYTHING = [
    ROLE,
    STILL,
    thinks("Hé"),
    thinks("m."),
    says("Let "),
    says("me."),
    calls(0, "ls"),
    argues(0, '{"a":'),
    argues(0, "1}"),
    calls(1, "agents__spawn"),
    argues(1, "{}"),
    chunk({}, finish_reason="tool_calls"),
    USAGE,
    DONE,
]


def parsed(said: bytes) -> list[Event]:
    """Return the events in *said*, whose names and numbers must be right; comments are left out."""
    found = []
    for event in said.split(b"\n\n")[:-1]:
        if event.startswith(b":"):
            continue
        name, data = event.split(b"\n")
        found.append(orjson.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + found[-1]["type"].encode()
    return found


def translating(numbered: Numbered, kept: list[Event] | None = None) -> ResponseEvents:
    kept = [] if kept is None else kept
    return ResponseEvents(numbered, kept.append)


def told(chunks: Sequence[bytes], *, wants_summary: bool = False) -> bytes:
    translation = translating(Numbered(outline(wants_summary=wants_summary)))
    return b"".join(map(translation.feed, chunks))


def events(*chunks: bytes, wants_summary: bool = False) -> list[Event]:
    return parsed(told(chunks, wants_summary=wants_summary))


def types(found: Sequence[Event]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in found]


def test_text_is_told_in_this_order() -> None:
    found = events(ROLE, says("Hi"), says(" you"), STOP, USAGE, DONE)

    assert types(found) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in found[4:6]] == ["Hi", " you"]
    assert found[6]["text"] == found[7]["part"]["text"] == "Hi you"


def test_every_event_is_what_strict_clients_expect() -> None:
    for event in events(*EVERYTHING, wants_summary=True):
        is_event(event)


def test_every_event_has_its_number() -> None:
    found = events(*EVERYTHING)

    assert [event["sequence_number"] for event in found] == list(range(len(found)))


def test_reasoning_text_and_calls_are_items_one_after_the_other() -> None:
    found = events(*EVERYTHING)

    added = [event for event in found if event["type"] == "response.output_item.added"]
    done = [event for event in found if event["type"] == "response.output_item.done"]
    assert [event["item"]["type"] for event in added] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert [event["output_index"] for event in added] == [0, 1, 2, 3]
    assert all(event["item"]["status"] == "in_progress" for event in added)
    assert [event["item"] for event in done] == found[-1]["response"]["output"]
    assert all(event["item"]["status"] == "completed" for event in done)


def test_what_an_event_is_about_is_the_item_that_forms() -> None:
    open_id = None
    for event in events(*EVERYTHING, wants_summary=True):
        if event["type"] == "response.output_item.added":
            open_id = event["item"]["id"]
        if "item_id" in event:
            assert event["item_id"] == open_id


def test_reasoning_is_told_as_it_forms() -> None:
    found = events(ROLE, thinks("Hm"), thinks("."), STOP, DONE)

    assert types(found)[2:] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    (item,) = found[-1]["response"]["output"]
    assert item["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert item["summary"] == []


def test_reasoning_is_its_own_summary_where_one_is_asked_for() -> None:
    found = events(ROLE, thinks("Hm"), thinks("."), STOP, DONE, wants_summary=True)

    assert types(found)[2:] == [
        "output_item.added",
        "content_part.added",
        "reasoning_summary_part.added",
        "reasoning_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "completed",
    ]
    (item,) = found[-1]["response"]["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "Hm."}]


def test_a_call_is_told_as_it_forms() -> None:
    found = events(ROLE, calls(0, "ls"), argues(0, '{"a":'), argues(0, "1}"), STOP, DONE)

    assert types(found)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert found[2]["item"]["arguments"] == ""
    assert found[5]["arguments"] == '{"a":1}'
    assert found[6]["item"] == {
        "id": f"fc_{KEY}_0",
        "type": "function_call",
        "status": "completed",
        "call_id": "call_0",
        "name": "ls",
        "arguments": '{"a":1}',
    }


def test_a_call_goes_back_into_its_namespace_at_once() -> None:
    found = events(ROLE, calls(0, "agents__spawn"), argues(0, "{}"), STOP, DONE)

    for event in (found[2], found[5]):
        assert (event["item"]["namespace"], event["item"]["name"]) == ("agents", "spawn")


def test_text_after_a_call_is_another_message() -> None:
    found = events(ROLE, says("a"), calls(0, "ls"), says("b"), STOP, DONE)

    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    assert len({item["id"] for item in output}) == 3


def test_the_last_event_tells_what_it_cost() -> None:
    response = events(ROLE, says("Hi"), STOP, USAGE, DONE)[-1]["response"]

    assert response["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 13,
    }


def test_an_engine_tells_its_usage_in_a_chunk() -> None:
    cost = b"data: " + orjson.dumps({"choices": [], "usage": COST}) + b"\n\n"

    response = events(ROLE, says("Hi"), STOP, cost, DONE)[-1]["response"]

    assert response["usage"]["input_tokens"] == 9


def test_an_answer_that_the_limit_cut_is_incomplete() -> None:
    found = events(ROLE, thinks("Hm"), says("Hi"), LENGTH, USAGE, DONE)

    response = found[-1]["response"]
    assert (found[-1]["type"], response["status"]) == ("response.incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["completed_at"] is None
    is_event(found[-1])


def test_calls_that_a_node_tells_all_at_once_are_items_one_after_the_other() -> None:
    found = events(
        calls(0, "ls"),
        calls(1, "rm"),
        argues(0, '{"a":'),
        argues(1, '{"b":'),
        argues(0, "1}"),
        argues(1, "2}"),
        DONE,
    )

    told = [(item["call_id"], item["arguments"]) for item in found[-1]["response"]["output"]]
    assert told == [("call_0", '{"a":1}'), ("call_1", '{"b":2}')]
    done = [event["output_index"] for event in found if event["type"].endswith("item.done")]
    assert done == [0, 1]


def test_an_answer_that_was_filtered_is_incomplete() -> None:
    found = events(says("Hi"), chunk({}, finish_reason="content_filter"), DONE)

    response = found[-1]["response"]
    assert found[-1]["type"] == "response.incomplete"
    assert response["incomplete_details"] == {"reason": "content_filter"}
    is_event(found[-1])


def test_an_answer_of_nothing_has_no_output() -> None:
    found = events(ROLE, STOP, USAGE, DONE)

    assert types(found) == ["created", "in_progress", "completed"]
    assert found[-1]["response"]["output"] == []


def test_a_stream_of_nothing_but_its_end_is_still_whole() -> None:
    assert types(events(DONE)) == ["created", "in_progress", "completed"]


def token(text: str, logprob: float | None = -0.5) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def test_log_probabilities_are_those_of_the_text() -> None:
    found = events(
        chunk(
            {"reasoning_content": "Hm", "content": "Hi"},
            logprobs={"content": [token("Hm"), token("</"), token("Hi")]},
        ),
        says("!", logprobs={"content": [token("!", None)]}),
        STOP,
        DONE,
    )

    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [[t["token"] for t in event["logprobs"]] for event in deltas] == [["Hi"], ["!"]]
    part = found[-1]["response"]["output"][1]["content"][0]
    assert [t["logprob"] for t in part["logprobs"]] == [-0.5, -9999.0]
    is_event(found[-1])


def test_keep_alives_are_comments_and_now_and_then_an_event() -> None:
    said = told([ROLE, *[STILL] * (2 * KEEP_ALIVES_PER_EVENT)])

    assert types(parsed(said)) == ["created", "in_progress", "in_progress", "in_progress"]
    assert said.count(b": keep-alive\n\n") == 2 * KEEP_ALIVES_PER_EVENT - 2


def test_a_keep_alive_before_the_first_chunk_begins_the_response() -> None:
    said = told([STILL, ROLE])

    assert types(parsed(said)) == ["created", "in_progress"]
    assert said.endswith(STILL)


def test_a_waiting_response_is_queued_and_goes_on_from_there() -> None:
    numbered = Numbered(outline())

    waiting = numbered.keep_alive("queued", "loading: 40 %")
    more = b"".join(numbered.keep_alive("queued", "x") for _ in range(KEEP_ALIVES_PER_EVENT - 1))
    then = translating(numbered).feed(ROLE + says("Hi") + STOP + DONE)

    assert types(parsed(waiting)) == ["created", "queued"]
    assert waiting.endswith(b": loading: 40 %\n\n")
    assert parsed(waiting)[1]["response"]["status"] == "queued"
    assert types(parsed(more)) == ["queued"]
    assert types(parsed(then))[:2] == ["in_progress", "output_item.added"]
    found = parsed(waiting + more + then)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))


def test_a_failure_in_the_middle_is_the_last_event() -> None:
    numbered = Numbered(outline())
    before = translating(numbered).feed(ROLE + thinks("Hm") + says("Hi"))

    after = parsed(numbered.fail(NodeFailed("it broke")))

    assert types(after) == ["failed"]
    assert after[0]["sequence_number"] == len(parsed(before))
    response = after[0]["response"]
    assert response["error"] == {"code": "node_failed", "message": "it broke"}
    assert [item["type"] for item in response["output"]] == ["reasoning"]
    is_event(after[0])


def test_a_failure_before_anything_is_told_is_one_of_a_response() -> None:
    found = parsed(Numbered(outline()).fail(NodeFailed("it broke")))

    assert types(found) == ["created", "in_progress", "failed"]


def test_a_nodes_error_frame_ends_the_stream_and_nothing_before_it_is_lost() -> None:
    frame = b'data: {"error": {"message": "it broke", "code": "overloaded"}}\n\n'
    translation = translating(Numbered(outline()))

    found = parsed(translation.feed(ROLE + says("Hi") + frame + says("more") + DONE))

    assert types(found)[-1] == "output_text.delta"
    assert isinstance(translation.error, Relayed)
    assert (translation.error.code, str(translation.error)) == ("overloaded", "it broke")


def test_a_connection_that_breaks_after_the_last_event_is_no_second_one() -> None:
    numbered = Numbered(outline())
    translating(numbered).feed(ROLE + DONE)

    assert numbered.fail(NodeFailed("it broke")) == b": it broke\n\n"


def test_an_error_frame_may_have_no_words() -> None:
    translation = translating(Numbered(outline()))

    translation.feed(ROLE + b'data: {"error": {}}\n\n')

    assert str(translation.error) == "the node gave no reason"


def test_what_is_told_last_is_what_is_kept() -> None:
    kept: list[dict[str, Any]] = []
    translation = translating(Numbered(outline()), kept)

    said = translation.feed(b"".join(EVERYTHING))

    assert kept == [parsed(said)[-1]["response"]]
    is_response(kept[0])


def test_an_answer_that_fails_is_not_kept() -> None:
    kept: list[dict[str, Any]] = []
    translation = translating(Numbered(outline()), kept)

    translation.feed(b"".join(EVERYTHING[:-1]))

    assert kept == []


STREAM = b"".join(EVERYTHING)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cut_anywhere_the_events_are_the_same(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(STREAM)]

    pieces = [STREAM[begin:end] for begin, end in pairwise(at)]

    assert steady(told(pieces)) == steady(told([STREAM]))


def steady(said: bytes) -> list[Event]:
    """Return the events of *said* without the time of its end."""
    found = parsed(said)
    found[-1]["response"].pop("completed_at")
    return found
