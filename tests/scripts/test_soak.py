"""What scripts/soak sends, what it takes for an end, and what it takes for growth."""

from __future__ import annotations

import argparse
import json
import random
import socket
from collections import Counter
from typing import Any

import pytest
import soak
import soak_ends
import soak_requests
from answers import Address
from processes import Holdings
from soak import Findings, Sample, growth, judge_growth, judge_lives, killing_rounds
from soak_ends import End, send
from soak_requests import Request, draw

from scripted_server import ScriptedServer

PATH = soak_requests.CHAT
ASKED = Request("chat", PATH, b'{"model": "m"}')
STREAMED = Request("stream", PATH, b'{"model": "m", "stream": true}')
DONE = b"data: [DONE]\n\n"


def chunk(finish: str | None = None) -> bytes:
    """Return an event of a stream, perhaps the one that says why it ends."""
    return b"data: " + json.dumps({"choices": [{"finish_reason": finish}]}).encode() + b"\n\n"


def error(code: str) -> bytes:
    """Return a frame that says what went wrong."""
    return b"data: " + json.dumps({"error": {"code": code}}).encode() + b"\n\n"


def end_of(request: Request, status: int, body: Any) -> End:
    """Return what is made of an answer to *request*."""
    with ScriptedServer({f"POST {PATH}": [(status, body)]}) as server:
        return send(Address("127.0.0.1", server.port), request)


def test_the_same_chance_draws_the_same_request() -> None:
    drawn = [draw(random.Random(f"1 {turn}")) for turn in range(200)]

    assert drawn == [draw(random.Random(f"1 {turn}")) for turn in range(200)]
    assert {request.kind for request in drawn} == set(soak_requests.WEIGHTS)


def test_every_request_but_a_wrong_one_is_json_with_a_model() -> None:
    for turn in range(200):
        request = draw(random.Random(turn))
        if request.kind != "bad":
            assert json.loads(request.body)["model"]


@pytest.mark.parametrize(
    ("request_sent", "status", "body", "how"),
    [
        (ASKED, 200, {"choices": [{"finish_reason": "stop"}]}, "stop"),
        (ASKED, 200, {"input_tokens": 3}, "counted"),
        (ASKED, 200, {"status": "loaded"}, "loaded"),
        (STREAMED, 200, chunk() + chunk("length") + DONE, "length"),
        (
            Request("bad", PATH, b"{}", expects="invalid_request"),
            400,
            {"error": {"code": "invalid_request"}},
            "invalid_request",
        ),
        (
            Request("stream", PATH, STREAMED.body, may_fail_with=frozenset({"node_failed"})),
            200,
            chunk() + error("node_failed"),
            "node_failed",
        ),
        (
            Request("cancelled", PATH, STREAMED.body, leaves_after_events=1),
            200,
            chunk() * 9,
            "left",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Request) else "",
)
def test_an_end_as_promised_is_no_violation(
    request_sent: Request, status: int, body: Any, how: str
) -> None:
    assert end_of(request_sent, status, body) == End(request_sent, how)


@pytest.mark.parametrize(
    ("request_sent", "status", "body", "wrong"),
    [
        (STREAMED, 200, chunk("stop"), "0 ends"),
        (STREAMED, 200, chunk("stop") + DONE + DONE, "2 ends"),
        (STREAMED, 200, chunk() + DONE, "0 finish reasons"),
        (STREAMED, 200, chunk("stop") * 2 + DONE, "2 finish reasons"),
        (STREAMED, 200, error("node_failed") + DONE, "goes on after an error"),
        (STREAMED, 200, error("node_failed"), "an error in the stream: node_failed"),
        (ASKED, 200, {"choices": [{"finish_reason": None}]}, "no finish reason"),
        (ASKED, 503, {"error": {"code": "overloaded"}}, "overloaded instead of an answer: None"),
        (ASKED, 502, b"<html>", "502 without a code: b'<html>'"),
        (
            Request("bad", PATH, b"{}", expects="invalid_request"),
            200,
            {"choices": []},
            "accepted instead of invalid_request",
        ),
    ],
    ids=str,
)
def test_every_other_end_is_a_violation(
    request_sent: Request, status: int, body: Any, wrong: str
) -> None:
    assert end_of(request_sent, status, body).wrong == wrong


def test_a_connection_that_breaks_is_a_violation() -> None:
    nobody = Address("127.0.0.1", 1)

    assert "the connection broke" in (send(nobody, ASKED).wrong or "")


def test_an_answer_that_does_not_come_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_ends, "SILENCE_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        end = send(Address("127.0.0.1", silent.getsockname()[1]), ASKED)

    assert end.how == "silence"


def test_growth_is_told_after_the_warm_up_and_only_from_enough_rounds() -> None:
    assert growth([50, 100, 100, 100, 100, 100, 100, 100, 100]) == 0
    assert growth([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == 6
    assert growth([1, 2, 3, 4]) is None


def test_a_process_that_gains_memory_or_descriptors_is_a_violation() -> None:
    findings = Findings()
    for turn in range(12):
        findings.samples["gateway"].append(Sample(1, Holdings(turn * 2**21, turn, 1)))
        findings.samples["neuron"].append(Sample(2, Holdings(2**21, 9, 1)))

    judge_growth(findings, 8 * 2**20)

    assert findings.violations == [
        "gateway has gained 12.0 MiB of memory",
        "gateway has gained 6 descriptors",
    ]


def test_a_process_that_was_killed_is_judged_by_its_newest_life() -> None:
    findings = Findings()
    for turn in range(12):
        findings.samples["neuron cpu:0"].append(Sample(turn // 6, Holdings(turn * 2**30, 9, 1)))

    judge_growth(findings, 1.0)

    assert findings.violations == []


@pytest.mark.parametrize(("kills", "violations"), [(0, 1), (1, 0)])
def test_a_process_that_dies_by_itself_is_a_violation(kills: int, violations: int) -> None:
    lives = [Sample(pid, Holdings(9, 9, 1)) for pid in (1, 1, 2)]
    findings = Findings(samples={"neuron cpu:0": lives}, kills=kills)

    judge_lives(findings)

    assert len(findings.violations) == violations


def test_no_device_is_killed_more_often_than_it_may_fall() -> None:
    killed = killing_rounds(30, 50, 1)

    assert Counter(name for names in killed.values() for name in names) == dict.fromkeys(
        soak.DEVICES, soak.KILLS_PER_DEVICE
    )
    assert killing_rounds(30, 0, 1) == {}


def test_a_round_with_a_kill_forgives_what_a_kill_explains() -> None:
    assert soak.forgiving(ASKED).may_fail_with >= soak_requests.FAULTS


@pytest.mark.parametrize("as_json", [True, False])
def test_the_report_shows_every_kind_and_every_violation(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    findings = Findings(ends=[End(ASKED, "stop")], violations=["round 1: something"], rounds=1)

    soak.report(findings, as_json=as_json)

    said = capsys.readouterr().out
    assert "chat                1  stop 1" in said
    assert "1 x round 1: something" in said
    assert (json.loads(said.splitlines()[-1])["rounds"] == 1) if as_json else "{" not in said


def test_the_report_says_where_growth_could_not_be_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few, enough = (
        Findings(samples={"gateway": [Sample(1, Holdings(9, 9, 1))] * n}) for n in (3, 12)
    )

    soak.report(few, as_json=False)
    assert "too few rounds to say whether it grows" in capsys.readouterr().out
    soak.report(enough, as_json=False)
    assert "too few rounds" not in capsys.readouterr().out


def test_the_defaults_are_ten_minutes_without_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["soak"])

    options: argparse.Namespace = soak.arguments()

    assert (options.minutes, options.kills) == (10.0, 0)
