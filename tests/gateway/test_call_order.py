"""Parts of calls, in the order in which clients can take them."""

from typing import Any

import pytest

from cortex.gateway.dialects.call_order import CallOrder
from cortex.ipc.errors import NodeFailed


def part(number: int, arguments: str = "") -> dict[str, Any]:
    return {"index": number, "function": {"arguments": arguments}}


def told(parts: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(said["index"], said["function"]["arguments"]) for said in parts]


def test_whole_calls_are_told_as_they_come() -> None:
    parts = [part(0), part(0, '{"a":'), part(0, "1}"), part(1, "{}"), part(2)]

    assert CallOrder().take(parts) == parts


def test_a_call_that_begins_too_early_waits_for_the_end() -> None:
    order = CallOrder()

    now = order.take([part(0, "{"), part(1, "["), part(0, "}"), part(2, "2"), part(1, "]")])

    assert told(now) == [(0, "{"), (0, "}")]
    assert told(order.rest()) == [(1, "["), (1, "]"), (2, "2")]
    assert order.rest() == []


def test_a_call_without_arguments_may_get_them_last() -> None:
    order = CallOrder()

    now = order.take([part(0), part(1, '{"a":1}'), part(0, "{}")])

    assert told(now + order.rest()) == [(0, ""), (0, "{}"), (1, '{"a":1}')]


def test_a_call_that_has_ended_may_only_be_given_nothing_more() -> None:
    order = CallOrder()
    order.take([part(0, "{}"), part(1, "{")])

    assert order.take([part(0), part(0, "\n"), part(0, "{}")]) == []
    with pytest.raises(NodeFailed):
        order.take([part(0, '{"a":')])


def test_words_behind_calls_end_all_of_them() -> None:
    order = CallOrder()
    order.take([part(0, "{"), part(1, "{")])
    order.rest()

    for number in (0, 1):
        with pytest.raises(NodeFailed):
            order.take([part(number, "}")])
    assert told(order.take([part(2, "{}")])) == [(2, "{}")]


def test_a_part_may_say_nothing_at_all() -> None:
    assert CallOrder().take([{}, {"function": None}]) == [{}, {"function": None}]
