"""Events, cut from bytes."""

import tracemalloc

import pytest

from cortex.gateway import sse


def test_an_event_in_pieces_comes_out_whole() -> None:
    splitter = sse.EventSplitter()

    assert splitter.feed(b'data: {"a"') == []
    assert splitter.feed(b": 1}\n") == []
    assert splitter.feed(b"\n: hi\n\nda") == [b'data: {"a": 1}', b": hi"]


def test_carriage_returns_do_not_matter() -> None:
    assert sse.EventSplitter().feed(b"data: 1\r\n\r\n") == [b"data: 1"]


def test_carriage_returns_do_not_matter_where_a_piece_ends_between_them_and_the_newline() -> None:
    splitter = sse.EventSplitter()

    assert [splitter.feed(piece) for piece in (b"data: 1\r", b"\n\r", b"\n")] == [
        [],
        [],
        [b"data: 1"],
    ]


@pytest.mark.parametrize("event", [b": comment", b"data: [DONE]", b"data: {broken", b""])
def test_what_is_no_json_object_has_no_data(event: bytes) -> None:
    assert sse.data_of(event) is None


@pytest.mark.parametrize("event", [b": keep-alive", b": usage {broken", b"data: {}"])
def test_what_is_no_usage_has_none(event: bytes) -> None:
    assert sse.usage_of(event) is None


def test_usage_is_in_a_comment() -> None:
    assert sse.usage_of(b': usage {"prompt_tokens":3}') == {"prompt_tokens": 3}


def test_a_comment_stays_on_its_line() -> None:
    assert sse.comment("a\ndata: b") == b": a data: b\n\n"


def test_an_event_may_have_a_name() -> None:
    assert sse.event({"a": 1}, "ping") == b'event: ping\ndata: {"a":1}\n\n'


def test_more_of_a_large_event_costs_no_copy_of_what_has_come() -> None:
    splitter, megabytes = sse.EventSplitter(), 8
    splitter.feed(b"data: " + b"x" * megabytes * 2**20)
    splitter.feed(b"x")

    tracemalloc.start()
    splitter.feed(b"x")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 2**20
