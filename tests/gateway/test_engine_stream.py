"""An engine's stream becomes a neuron's, however it is written; all of it pure."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.gateway.engine_stream import EngineStream
from cortex.gateway.usage import Meter
from fake_engine import USAGE, chunk, said

HELLO = chunk({"content": "Hello"})
FINISH = chunk({}, "stop")
COST = {"choices": [], "usage": USAGE}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def passed(
    stream: bytes, *, is_translated: bool = False, shows_usage: bool = False, size: int = 7
) -> bytes:
    """Return what becomes of *stream*, which comes in pieces of *size* bytes."""
    engine = EngineStream("ray", is_translated=is_translated, shows_usage=shows_usage)
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    return b"".join(map(engine.feed, pieces)) + engine.end()


def data(stream: bytes) -> list[dict[str, Any]]:
    lines = [line for line in stream.split(b"\n") if line.startswith(b"data: {")]
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines]


def translated(*chunks: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices that dialects read."""
    return [found["choices"][0] for found in data(passed(said(*chunks), is_translated=True))]


def metered(stream: bytes) -> Meter:
    meter = Meter()
    meter.saw(stream)
    meter.ended()
    return meter


def test_chunks_pass_byte_for_byte() -> None:
    odd = 'data: {"choices":[{"delta": {"reasoning":"\\u00e9", "x":1.50}}]}\n\n'

    assert passed(said(odd, FINISH)).startswith(odd.encode())


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_lines_may_end_in_any_way_and_need_no_space(size: int) -> None:
    plain = said(HELLO, FINISH)
    odd = plain.replace(b"\n", b"\r\n").replace(b"data: ", b"data:")

    assert passed(odd, size=size) == plain


def test_names_and_numbers_of_events_are_left_out() -> None:
    assert passed(b"event: message\nid: 3\n" + said(FINISH)) == said(FINISH)


def test_data_may_stand_in_several_lines() -> None:
    broken = said(FINISH).replace(b',"', b',\ndata: "')

    assert data(passed(broken)) == [FINISH]


def test_comments_pass() -> None:
    assert passed(said(": ping - 2026\r\n\r\n", FINISH)) == said(": ping - 2026\n\n", FINISH)


@pytest.mark.parametrize(
    "chunks", [(HELLO, FINISH, COST), (HELLO, COST, FINISH), (COST, HELLO, FINISH)]
)
def test_the_usage_is_told_at_the_end_and_its_chunk_dropped(chunks: Any) -> None:
    stream = passed(said(*chunks))

    assert data(stream) == [HELLO, FINISH]
    assert stream.endswith(b": usage " + orjson.dumps(USAGE) + b"\n\ndata: [DONE]\n\n")


def test_the_chunk_of_the_usage_stays_where_it_was_asked_for() -> None:
    stream = passed(said(HELLO, FINISH, COST), shows_usage=True)

    assert data(stream) == [HELLO, FINISH, COST]


def test_usage_that_stands_in_the_last_chunk_is_read_and_stays() -> None:
    last = {**FINISH, "usage": {**USAGE, "prompt_tokens_details": None, "x": "y"}}
    stream = passed(said(HELLO, last))
    usage = metered(stream).usage

    assert data(stream) == [HELLO, last]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 2)


def test_details_of_the_usage_are_kept() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": None}}
    stream = passed(said(FINISH, {"choices": [], "usage": {"prompt_tokens": 7, **details}}))
    usage = metered(stream).usage

    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens, usage.completion_tokens) == (5, 0)


def test_the_comment_of_another_gateway_is_understood() -> None:
    comment = f": usage {orjson.dumps(USAGE).decode()}\n\n"

    assert passed(said(FINISH, comment)).count(b"usage") == 1


@pytest.mark.parametrize(
    "event",
    [
        'data: {"error":{"message":"out of memory","code":500}}\n\n',
        'data: {"object":"error","message":"out of memory","code":500}\n\n',
        'data: {"error":"out of memory"}\n\n',
        'event: error\ndata: {"error":{"message":"out of memory"}}\n\n',
        'error: {"message":"out of memory","code":500}\n\n',
    ],
)
def test_an_error_ends_the_stream_in_our_words(event: str) -> None:
    stream = passed(said(HELLO, event))
    meter = metered(stream)

    assert b"[DONE]" not in stream
    assert meter.error is not None
    assert (meter.error.code, str(meter.error)) == (
        "node_failed",
        "node ray failed: out of memory",
    )


def test_numbers_that_json_does_not_have_pass() -> None:
    odd = 'data: {"choices": [], "logprob": NaN}\n\n'

    assert passed(said(odd, FINISH)) == said(odd, FINISH)


@pytest.mark.parametrize("payload", ["{broken", "3", "[]"])
def test_what_is_no_object_is_an_error(payload: str) -> None:
    assert metered(passed(said(f"data: {payload}\n\n"))).error is not None


def test_one_object_instead_of_a_stream_is_an_error_if_it_is_one() -> None:
    meter = metered(passed(b'{"error":{"message":"no","code":400}}'))

    assert meter.error is not None
    assert meter.error.code == "invalid_request"


@pytest.mark.parametrize(("chunks", "is_complete"), [((HELLO, FINISH), True), ((HELLO,), False)])
def test_a_stream_that_has_finished_may_lack_its_last_line(chunks: Any, is_complete: bool) -> None:
    assert metered(passed(said(*chunks, end=""))).is_complete is is_complete


def test_an_event_may_lack_the_empty_line_at_the_end() -> None:
    assert passed(said(FINISH)[:-2]) == said(FINISH)


def test_what_follows_the_end_is_not_passed_on() -> None:
    assert passed(said(FINISH) + said(HELLO)) == said(FINISH)


def test_an_answer_that_is_cut_off_does_not_look_complete() -> None:
    meter = metered(passed(said(HELLO)))

    assert meter.error is not None
    assert not meter.is_complete


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_called_one_thing(name: str) -> None:
    choice, _ = translated(chunk({name: "Hm."}), FINISH)

    assert choice["delta"] == {"reasoning_content": "Hm."}


def test_calls_that_come_whole_get_numbers_of_their_own() -> None:
    same = [{**CALL, "index": 0}, {**CALL, "index": 0, "id": "y"}]

    first, last = translated(chunk({"tool_calls": same}), chunk({}, "stop"))

    assert [(c["index"], c["id"]) for c in first["delta"]["tool_calls"]] == [(0, "x"), (1, "y")]
    assert last["finish_reason"] == "tool_calls"


def test_calls_of_several_chunks_stay_together() -> None:
    begin = {"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a"'}}
    other_id = {"index": 0, "id": "z", "function": {"arguments": ":1"}}
    no_number = {"function": {"name": None, "arguments": "}"}}
    again = {"index": 0, "id": "x", "function": {"name": "f", "arguments": " "}}

    found = translated(
        *(chunk({"tool_calls": [c]}) for c in (begin, more, other_id, no_number, again)),
        chunk({}, "tool_calls"),
    )

    calls = [call for choice in found for call in choice["delta"].get("tool_calls", [])]
    assert {call["index"] for call in calls} == {0}
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a":1} '


def test_a_call_without_an_id_gets_one() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    choice, _ = translated(chunk({"tool_calls": calls}), FINISH)

    [call] = choice["delta"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_a_call_without_arguments_gets_them_at_its_end() -> None:
    call = {"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}

    *_, last = translated(chunk({"tool_calls": [call]}), chunk({}, "tool_calls"))

    assert last["delta"]["tool_calls"] == [{"index": 0, "function": {"arguments": "{}"}}]


def test_the_old_form_of_a_call_is_one() -> None:
    first, second = (
        {"function_call": {"name": "f", "arguments": '{"a'}},
        {"function_call": {"name": "f", "arguments": '":1}'}},
    )

    found = translated(chunk(first), chunk(second), chunk({}, "function_call"))

    calls = [call for choice in found for call in choice["delta"].get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a":1}'
    assert found[-1]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_stays_cut() -> None:
    call = {"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}

    *_, last = translated(chunk({"tool_calls": [call]}), chunk({}, "length"))

    assert (last["finish_reason"], last["delta"]) == ("length", {})


NAMES = st.sampled_from(
    [
        "choices",
        "delta",
        "message",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "usage",
        "id",
        "index",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "function_call",
        "reasoning",
    ]
)
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["x", "stop", ""])
SHAPES = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner), max_leaves=20
)


@given(shapes=st.lists(st.dictionaries(NAMES, SHAPES), max_size=4), is_translated=st.booleans())
def test_whatever_an_engine_streams_becomes_whole_events(
    shapes: list[dict[str, Any]], is_translated: bool
) -> None:
    stream = passed(said(*shapes), is_translated=is_translated)

    assert stream.endswith(b"\n\n")
    for line in stream.split(b"\n\n")[:-1]:
        assert line.startswith((b"data: {", b": usage {", b"data: [DONE]"))
