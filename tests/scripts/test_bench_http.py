"""How scripts/bench-http reads streams, and what it makes of its rounds."""

from __future__ import annotations

import os

import pytest
from answers import Address, Trouble
from bench_http import Turn, completion_tokens, figures, streamed
from processes import busy_seconds, cpu_seconds, cpu_seconds_by_name, named, proportional_bytes

from scripted_server import ScriptedServer

PATH = "/v1/chat/completions"
STREAM = b'data: {"x": 1}\n\ndata: {"usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n'


def test_all_streams_are_read_to_their_ends() -> None:
    with ScriptedServer({f"POST {PATH}": [(200, STREAM)]}) as server:
        seconds, answers = streamed(
            Address("127.0.0.1", server.port), PATH, [{"n": n} for n in range(3)]
        )
        asked = server.bodies(f"POST {PATH}")

    assert seconds > 0
    assert [completion_tokens(answer) for answer in answers] == [7, 7, 7]
    assert sorted(body["n"] for body in asked) == [0, 1, 2]


@pytest.mark.parametrize(
    ("status", "body"), [(200, STREAM.removesuffix(b"data: [DONE]\n\n")), (503, {"error": "busy"})]
)
def test_a_stream_that_ends_otherwise_is_trouble(status: int, body: object) -> None:
    with (
        ScriptedServer({f"POST {PATH}": [(status, body)]}) as server,
        pytest.raises(Trouble, match="ended early"),
    ):
        streamed(Address("127.0.0.1", server.port), PATH, [{}])


def test_an_answer_without_usage_is_trouble() -> None:
    with pytest.raises(Trouble, match="without usage"):
        completion_tokens(b"data: [DONE]\n\n")


def test_ratios_are_of_rounds_and_processor_time_is_per_token() -> None:
    rounds = [
        (Turn(2.0, 100, {"supervisor": 0.2}), Turn(1.0, 100, {"supervisor": 0.1})),
        (Turn(1.0, 100, {"supervisor": 0.2}), Turn(1.0, 100, {"supervisor": 0.1})),
        (Turn(4.0, 100, {"supervisor": 0.2}), Turn(1.0, 100, {"supervisor": 0.1})),
    ]

    found = figures(rounds)

    assert found["ratio"] == {"median": 0.5, "least": 0.25, "most": 1.0}
    assert found["tokens/s"] == {"HTTP": 50.0, "direct": 100.0}
    assert found["CPU seconds per 1,000 tokens"]["HTTP"] == {"supervisor": 2.0}


def test_proc_tells_what_a_process_took() -> None:
    own = cpu_seconds(os.getpid())

    assert 0 < own <= cpu_seconds(os.getpid()) <= busy_seconds()
    assert cpu_seconds_by_name(os.getpid()).keys() == named(os.getpid()).keys()
    assert proportional_bytes("self") > 2**20
