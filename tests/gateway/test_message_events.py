"""A node's stream in Anthropic's events."""

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anthropic_schema import faults, schema_of
from cortex.gateway.dialects.message_answers import Expected
from cortex.gateway.dialects.message_events import MessageEvents
from cortex.gateway.dialects.message_thinking import signature_of
from cortex.gateway.errors import Relayed

Events = list[tuple[str, dict[str, Any]]]


def chunk(**choice: Any) -> bytes:
    data = {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": None, **choice}]}
    return b"data: " + orjson.dumps(data) + b"\n\n"


def text(word: str) -> bytes:
    return chunk(delta={"content": word})


def reasoning(word: str) -> bytes:
    return chunk(delta={"reasoning_content": word})


def call(index: int, arguments: str = "", **begin: Any) -> bytes:
    """Return a part of a call; *begin* has the id and the name of one that begins."""
    function = {"arguments": arguments, **({"name": begin["name"]} if begin else {})}
    head = {"id": begin["id"], "type": "function"} if begin else {}
    return chunk(delta={"tool_calls": [{"index": index, **head, "function": function}]})


ROLE = chunk(delta={"role": "assistant", "content": ""})
FINISH = chunk(finish_reason="stop")
COST = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
USAGE = b": usage " + orjson.dumps(COST) + b"\n\n"
DONE = b"data: [DONE]\n\n"
END = FINISH + USAGE + DONE
CALLS = (
    ROLE
    + reasoning("Hm")
    + reasoning(", é.")
    + b": keep-alive\n\n"
    + text("Let me ")
    + text("look.")
    + call(0, id="t0", name="Bash")
    + call(0, '{"comm')
    + call(0, 'and": "ls"}')
    + call(1, id="t1", name="Grep")
    + call(1, "{}")
    + chunk(finish_reason="tool_calls")
    + USAGE
    + DONE
)


def events_of(*chunks: bytes, prompt_tokens: int = 9, **expected: Any) -> Events:
    """Return the names and data of the events that *chunks* become."""
    translation = MessageEvents(Expected("m", **expected), prompt_tokens)
    said = b"".join(map(translation.feed, chunks))
    found = []
    for event in said.split(b"\n\n")[:-1]:
        name, data = event.split(b"\n")
        found.append((name.removeprefix(b"event: ").decode(), orjson.loads(data[len("data: ") :])))
    return found


def names(events: Events) -> list[str]:
    return [name for name, _ in events]


def outline(events: Events) -> list[Any]:
    """Return of each block its kind, what was added to it and its index at begin and end."""
    blocks: list[Any] = []
    for name, data in events:
        if name == "content_block_start":
            blocks.append([data["content_block"]["type"], [], data["index"], None])
        elif name == "content_block_delta":
            assert data["index"] == blocks[-1][2]
            blocks[-1][1].append(list(data["delta"].values())[1])
        elif name == "content_block_stop":
            blocks[-1][3] = data["index"]
    return blocks


def test_a_stream_is_told_in_anthropics_order() -> None:
    events = events_of(ROLE, text("Hi"), text(" there"), END)

    assert names(events) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(name == data["type"] for name, data in events)
    assert outline(events) == [["text", ["Hi", " there"], 0, 0]]


def test_thinking_text_and_calls_are_blocks_one_after_the_other() -> None:
    assert outline(events_of(CALLS)) == [
        ["thinking", ["Hm", ", é.", ""], 0, 0],
        ["text", ["Let me ", "look."], 1, 1],
        ["tool_use", ['{"comm', 'and": "ls"}'], 2, 2],
        ["tool_use", ["{}"], 3, 3],
    ]


def test_a_call_is_announced_with_its_id_and_name() -> None:
    starts = [d["content_block"] for n, d in events_of(CALLS) if n == "content_block_start"]

    assert starts[2] == {
        "type": "tool_use",
        "id": "t0",
        "name": "Bash",
        "input": {},
        "caller": {"type": "direct"},
    }


def test_a_call_is_told_as_it_forms() -> None:
    translation = MessageEvents(Expected("m"), 1)
    translation.feed(ROLE + call(0, id="t0", name="Bash"))

    assert b'"partial_json":"{\\"comm"' in translation.feed(call(0, '{"comm'))


def test_a_call_whose_first_chunk_has_arguments_loses_none_of_them() -> None:
    events = events_of(ROLE, call(0, '{"a":', id="t0", name="Bash"), call(0, "1}"), END)

    assert outline(events) == [["tool_use", ['{"a":', "1}"], 0, 0]]


def test_calls_that_a_node_tells_all_at_once_are_blocks_one_after_the_other() -> None:
    interleaved = (
        call(0, '{"a":', id="t0", name="Bash")
        + call(1, '{"b":', id="t1", name="Grep")
        + call(0, "1}")
        + call(1, "2}")
    )

    events = events_of(ROLE, interleaved, END)

    assert outline(events) == [
        ["tool_use", ['{"a":', "1}"], 0, 0],
        ["tool_use", ['{"b":', "2}"], 1, 1],
    ]


def test_words_behind_a_call_are_another_block() -> None:
    events = events_of(ROLE, text("a"), call(0, id="t", name="B"), text("b"), reasoning("c"), END)

    assert [block[0] for block in outline(events)] == ["text", "tool_use", "text", "thinking"]


def test_thinking_that_is_to_be_omitted_is_estimated_and_comes_in_the_signature() -> None:
    stream = (ROLE, reasoning("Hm"), reasoning(", let me see"), text("Hi"), END)

    events = events_of(*stream, omits_thinking=True)

    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    assert [delta.get("estimated_tokens") for delta in deltas] == [1, 3, None, None]
    assert outline(events)[0] == ["thinking", ["", "", signature_of("Hm, let me see")], 0, 0]


@pytest.mark.parametrize("omits_thinking", [False, True])
def test_every_event_is_in_the_published_schema(omits_thinking: bool) -> None:
    events = events_of(CALLS, omits_thinking=omits_thinking)

    told = [(name, data) for name, data in events if name != "ping"]
    assert [faults(data, schema_of(name)) for name, data in told] == [[] for _ in told]
    assert [faults(data, "Beta" + schema_of(name)) for name, data in told] == [[] for _ in told]


@given(
    cuts=st.lists(st.integers(0, len(CALLS.replace(b"\n", b"\r\n"))), max_size=12),
    newline=st.sampled_from([b"\n", b"\r\n"]),
)
def test_cut_anywhere_the_events_are_the_same(cuts: list[int], newline: bytes) -> None:
    stream = CALLS.replace(b"\n", newline)
    bounds = [0, *sorted(cuts), len(stream)]

    pieces = [stream[a:b] for a, b in pairwise(bounds)]

    assert _without_id(events_of(*pieces)) == _without_id(events_of(CALLS))


def test_cut_into_bytes_the_events_are_the_same() -> None:
    pieces = [CALLS[at : at + 1] for at in range(len(CALLS))]

    assert _without_id(events_of(*pieces)) == _without_id(events_of(CALLS))


def _without_id(events: Events) -> Events:
    events[0][1]["message"].pop("id")
    return events


def test_the_first_event_tells_the_tokens_of_the_prompt() -> None:
    (_, start), *_ = events_of(ROLE, prompt_tokens=9)

    assert start["message"]["usage"]["input_tokens"] == 9
    assert start["message"]["stop_reason"] is None


def test_the_last_event_tells_what_it_cost() -> None:
    *_, (_, delta), _ = events_of(ROLE, END)

    usage = delta["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (5, 4)
    assert usage["output_tokens"] == 2
    assert usage["output_tokens_details"] == {"thinking_tokens": 1}


def test_an_engine_tells_what_it_cost_in_a_chunk_without_choices() -> None:
    last = b"data: " + orjson.dumps({"choices": [], "usage": COST}) + b"\n\n"

    *_, (_, delta), _ = events_of(ROLE, FINISH, last, DONE)

    assert delta["usage"]["cache_read_input_tokens"] == 4


def test_a_diagnosis_that_was_asked_for_is_in_the_first_event() -> None:
    why = {"cache_miss_reason": {"type": "unavailable"}}

    (_, start), *_ = events_of(ROLE, diagnostics=why)

    assert start["message"]["diagnostics"] == why


def test_a_keep_alive_becomes_a_ping() -> None:
    events = events_of(ROLE, b": keep-alive\n\n", b": keep-alive\n\n")

    assert names(events) == ["message_start", "ping", "ping"]


def test_an_answer_without_text_has_no_block() -> None:
    assert names(events_of(ROLE, END)) == ["message_start", "message_delta", "message_stop"]


def test_a_stream_of_nothing_but_its_end_is_still_whole() -> None:
    assert names(events_of(DONE))[0] == "message_start"


def test_a_nodes_error_frame_ends_the_stream_and_nothing_before_it_is_lost() -> None:
    frame = b'data: {"error": {"message": "gone", "code": "overloaded"}}\n\n'
    translation = MessageEvents(Expected("m"), 1)

    said = translation.feed(ROLE + text("Hi") + frame + text("more") + DONE)

    assert said.endswith(b'"delta":{"type":"text_delta","text":"Hi"}}\n\n')
    assert isinstance(translation.error, Relayed)
    assert (translation.error.code, translation.error.status) == ("overloaded", 503)


def test_the_last_event_tells_why_it_stopped() -> None:
    *_, (_, delta), _ = events_of(ROLE, call(0, id="t", name="B"), FINISH, USAGE, DONE)

    assert delta["delta"] == {
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def test_an_answer_at_its_limit_says_so_where_the_node_does_not_tell_what_it_cost() -> None:
    events = events_of(ROLE, chunk(finish_reason="length"), DONE, max_tokens=32000)

    assert events[-2][1]["delta"]["stop_reason"] == "max_tokens"


def test_an_answer_that_filled_the_context_before_its_limit_says_so() -> None:
    stream = (ROLE, text("a"), chunk(finish_reason="length"), USAGE, DONE)

    *_, (_, full), _ = events_of(*stream, max_tokens=32000)
    *_, (_, limited), _ = events_of(*stream, max_tokens=2)

    assert full["delta"]["stop_reason"] == "model_context_window_exceeded"
    assert limited["delta"]["stop_reason"] == "max_tokens"
