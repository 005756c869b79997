"""What scripts/soak demands of answers, and what it takes for one that is like that."""

from __future__ import annotations

import random
from typing import Any

import pytest
import soak
import soak_demands
import soak_ends
import soak_requests
from answers import Address
from soak import Findings, judge_prefixes
from soak_demands import CALL, wrong
from soak_ends import End, send
from soak_requests import CHAT, Request

from scripted_server import ScriptedServer


@pytest.mark.parametrize(
    ("demand", "text"),
    [
        ("schema", '{"name": "Ann", "count": 3, "city": "Rome"}'),
        ("object", '{"anything": []}'),
        ("regex", "Anna, 12 years"),
        ("choice", "Oslo"),
        ("call", f'{CALL}book {{"city": "Rome", "seats": 2}}'),
        (
            "call",
            f'{CALL}book {{"city": "Rome", "seats": 2}}{CALL}book {{"city":"Oslo","seats":9}}',
        ),
    ],
)
def test_an_answer_as_demanded_is_right(demand: str, text: str) -> None:
    assert wrong(demand, text, "stop") is None


@pytest.mark.parametrize(
    ("demand", "text"),
    [
        ("schema", '{"name": "Ann", "count": 3}'),
        ("schema", '{"name": "Ann", "count": true, "city": "Rome"}'),
        ("schema", '{"name": "Ann", "count": 100, "city": "Rome"}'),
        ("schema", '{"name": "Ann, who is long", "count": 3, "city": "Rome"}'),
        ("schema", '{"name": "Ann", "count": 3, "city": "Rome"'),
        ("object", "[]"),
        ("regex", "Anna, 12 years and more"),
        ("choice", "Oslo "),
        ("call", '{"city": "Rome", "seats": 2}'),
        ("call", f'{CALL}book {{"city": "Rome", "seats": 0}}'),
        ("call", f'Well: {CALL}book {{"city": "Rome", "seats": 2}}'),
    ],
)
def test_any_other_answer_is_wrong_unless_it_was_cut(demand: str, text: str) -> None:
    assert "demanded" in (wrong(demand, text, "stop") or "")
    assert wrong(demand, text, "length") is None


def test_every_demand_is_drawn() -> None:
    drawn = {soak_demands.draw(random.Random(seed))[0] for seed in range(60)}

    assert drawn == set(soak_demands.DEMANDS)


def end_of(body: Any, *, is_stream: bool, demands: str) -> End:
    """Return what is made of an answer that had to be of some form."""
    request = Request(
        "demand", CHAT, b'{"model": "m", "stream": true}' if is_stream else b"{}", demands=demands
    )
    with ScriptedServer({f"POST {CHAT}": [(200, body)]}) as server:
        return send(Address("127.0.0.1", server.port), request)


def test_a_call_is_gathered_from_its_pieces() -> None:
    pieces = (
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": '
        b'{"name": "book", "arguments": ""}}]}}]}\n\n'
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": '
        b'{"arguments": "{\\"city\\": \\"Rome\\", \\"seats\\": %s}"}}]}}]}\n\n'
        b'data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}\n\n'
        b"data: [DONE]\n\n"
    )

    assert end_of(pieces % b"2", is_stream=True, demands="call").wrong is None
    assert "demanded call" in (end_of(pieces % b"0", is_stream=True, demands="call").wrong or "")


def test_a_whole_answer_is_held_to_its_demand() -> None:
    def answer(text: str) -> dict[str, Any]:
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    assert end_of(answer("Oslo"), is_stream=False, demands="choice").wrong is None
    assert end_of(answer("Bern"), is_stream=False, demands="choice").wrong


def test_a_stream_that_is_only_kept_alive_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_ends, "SILENCE_SECONDS", -1.0)
    said = soak_ends._events([b'data: {"choices": []}\n', b": keep-alive\n"])

    assert next(said) == {"choices": []}
    with pytest.raises(TimeoutError, match="nothing but comments"):
        next(said)


def shared(cached_tokens: int) -> End:
    """Return the end of a prompt with the common head."""
    request = Request("shared", CHAT, b"{}")
    return End(request, "length", cached_tokens=cached_tokens)


def test_a_prefix_cache_that_never_helps_is_a_violation() -> None:
    never = Findings(ends=[shared(0)] * soak.ENOUGH_SHARED)
    once = Findings(ends=[*never.ends, shared(16)])
    few = Findings(ends=never.ends[1:])
    for findings in (never, once, few):
        judge_prefixes(findings)

    assert never.violations == ["no prompt's head was ever found in the prefix cache"]
    assert once.violations == few.violations == []


def test_a_stream_tells_what_was_cached() -> None:
    usage = (
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 48}}}\n\n'
        b"data: [DONE]\n\n"
    )
    request = Request("shared", CHAT, b'{"stream": true}')
    with ScriptedServer({f"POST {CHAT}": [(200, usage)]}) as server:
        end = send(Address("127.0.0.1", server.port), request)

    assert (end.wrong, end.cached_tokens) == (None, 48)


def test_prompts_with_the_common_head_differ_behind_it() -> None:
    requests = [soak_requests.draw(random.Random(seed)) for seed in range(300)]
    bodies = {request.body for request in requests if request.kind == "shared"}

    assert len(bodies) > 5
    assert all(soak_requests.SHARED_HEAD.encode() in body for body in bodies)
