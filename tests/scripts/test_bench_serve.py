"""The plan, the requests and the figures of scripts/bench-serve."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import bench_serve
import pytest
from answers import Trouble
from bench_serve import Rate, figures, quantiles
from serve_load import CHAT, Endpoint, Lengths, Planned, PromptMaker, Seen, plan, run

from scripted_server import Reply, ScriptedServer


@pytest.mark.parametrize(
    ("text", "least", "most"), [("7", 7, 7), ("3-9", 3, 9), ("lognormal:100:0.5", 1, 10_000)]
)
def test_lengths_are_drawn_within_their_bounds(text: str, least: int, most: int) -> None:
    lengths = Lengths.parse(text)
    drawn = [lengths.draw(random.Random(seed)) for seed in range(500)]

    assert least <= min(drawn) <= max(drawn) <= most
    assert len(set(drawn)) > 1 or least == most


def test_the_median_of_a_log_normal_is_as_asked() -> None:
    chance = random.Random(1)
    drawn = [Lengths.parse("lognormal:200:1").draw(chance) for _ in range(4000)]

    assert 185 < statistics.median(drawn) < 215


@pytest.mark.parametrize("text", ["", "-3", "a", "lognormal:5", "lognormal:5:-1"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no N, A-B or lognormal"):
        Lengths.parse(text)


def test_a_plan_is_poisson_and_the_same_for_a_seed() -> None:
    inputs, outputs = Lengths.parse("5"), Lengths.parse("1-9")
    planned = plan(10.0, 400.0, inputs, outputs, seed=1)
    gaps = [b.due - a.due for a, b in itertools.pairwise(planned)]

    assert planned == plan(10.0, 400.0, inputs, outputs, seed=1)
    assert planned != plan(10.0, 400.0, inputs, outputs, seed=2)
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.1)  # as an exponential has it
    assert max(one.due for one in planned) < 400.0


def test_prompts_have_a_common_head_and_their_own_rest() -> None:
    maker = PromptMaker("1", shared_tokens=30, tokens_per_word=1.5, template_tokens=10)
    one, other = (maker.prompt(number, 100).split() for number in (1, 2))

    assert len(one) == len(other) == 60
    assert one[:20] == other[:20]
    assert one[20:] != other[20:]
    assert maker.prompt(1, 100).split() == one
    assert len(maker.prompt(1, 1).split()) == 1


def seen(pieces: list[float], tokens: int | None = None, error: str | None = None) -> Seen:
    """Return what was seen of a request."""
    ended = pieces[-1] if pieces else 1.0
    return Seen(Planned(0.0, 0, 1, 9), pieces, tokens, ended=ended, error=error)


def test_figures_are_of_those_that_ended_well() -> None:
    fast, slow = seen([0.1, 0.2, 0.3], tokens=5), seen([2.0, 2.1], tokens=2)
    rate = Rate(1.0, 4, [fast, slow, seen([], error="503 overloaded")], seconds=2.0)

    found = figures(rate, slo_ttft_ms=500, slo_itl_ms=100)

    assert (found["planned"], found["ended"], found["ended well"]) == (4, 3, 2)
    assert found["errors"] == {"503 overloaded": 1}
    assert found["goodput"] == pytest.approx(1 / 3)
    assert found["tokens/s"] == 3.5
    assert found["goodput, tokens/s"] == 2.5
    assert found["TTFT"]["p50"] == 2000
    assert found["ITL"]["p99"] == pytest.approx(100)
    assert found["tokens counted by"] == "usage"


def test_pieces_are_counted_where_the_server_counts_nothing() -> None:
    found = figures(Rate(1.0, 1, [seen([0.1, 0.2, 0.3])], 1.0), 500, 100)

    assert found["output tokens"] == 3
    assert found["tokens counted by"] == "pieces"
    assert found["prompt tokens"] is None


def test_tokens_that_come_too_slowly_are_no_good() -> None:
    assert figures(Rate(1.0, 1, [seen([0.1, 0.5], tokens=3)], 1.0), 500, 100)["goodput"] == 0
    assert figures(Rate(1.0, 1, [seen([0.1, 0.5], tokens=3)], 1.0), 500, 201)["goodput"] == 1


def test_quantiles_are_values_that_were_seen() -> None:
    assert quantiles([n / 1000 for n in range(100)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert quantiles([0.003]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert quantiles([]) is None


def said(*events: dict[str, Any], ends: bool = True) -> Reply:
    """Return a stream."""
    frames = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return 200, (frames + ("data: [DONE]\n\n" if ends else "")).encode()


WORD = {"choices": [{"delta": {"content": "word"}}]}
OPENING = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}


def usage(prompt: int, cached: int | None = None) -> dict[str, Any]:
    """Return the last event of a stream."""
    counts: dict[str, Any] = {"completion_tokens": 2, "prompt_tokens": prompt}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"choices": [], "usage": counts}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def asked(session: aiohttp.ClientSession, reply: Reply) -> Seen:
    """Return what is seen of a request that is answered with *reply*."""
    with ScriptedServer({f"POST {CHAT}": [reply]}) as server:
        endpoint = Endpoint(session, f"http://127.0.0.1:{server.port}/v1/", "m", {"more": 1})
        found = await endpoint.ask(
            Planned(0.0, 0, 1, 9), "words", asyncio.get_running_loop().time()
        )
        assert server.bodies(f"POST {CHAT}")[0] == {
            "model": "m",
            "messages": [{"role": "user", "content": "words"}],
            "max_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
            "more": 1,
        }
    return found


async def test_pieces_and_usage_are_seen(session: aiohttp.ClientSession) -> None:
    found = await asked(session, said(OPENING, WORD, WORD, usage(11, cached=8)))

    assert found.error is None
    assert len(found.pieces) == 2
    assert (found.tokens, found.prompt_tokens, found.cached_tokens) == (2, 11, 8)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((503, {"error": {"code": "overloaded"}}), "503 overloaded"),
        ((500, {"error": "words"}), "500 words"),
        ((502, b"<html>"), "502 b'<html>'"),
        (said(WORD, {"error": {"type": "gone"}}), "in the stream: gone"),
        (said(WORD, ends=False), "ended without [DONE]"),
        ((200, b"data: {\n\n"), "an event that is no JSON"),
    ],
)
async def test_errors_are_told_by_kind(
    session: aiohttp.ClientSession, reply: Reply, error: str
) -> None:
    assert (await asked(session, reply)).error == error


async def test_nobody_there_and_nobody_answering_are_errors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        impatient = aiohttp.ClientTimeout(total=0.05)
        async with aiohttp.ClientSession(timeout=impatient) as session:
            late = await Endpoint(session, url, "m", {}).ask(Planned(0.0, 0, 1, 1), "", 0.0)
    async with aiohttp.ClientSession() as session:
        gone = await Endpoint(session, url, "m", {}).ask(Planned(0.0, 0, 1, 1), "", 0.0)

    assert late.error == "timeout"
    assert gone.error == f"nothing answers at {url.removeprefix('http://')}"


async def test_two_questions_tell_what_a_word_is(session: aiohttp.ClientSession) -> None:
    replies = [said(WORD, usage(40)), said(WORD, usage(340))]
    with ScriptedServer({f"POST {CHAT}": replies}) as server:
        endpoint = Endpoint(session, f"http://127.0.0.1:{server.port}", "m", {})
        maker = await endpoint.calibrated(PromptMaker("1", 5))

    assert maker == PromptMaker("1", 5, tokens_per_word=1.5, template_tokens=10.0)


async def test_a_server_without_usage_in_streams_is_asked_without(
    session: aiohttp.ClientSession,
) -> None:
    replies = [(400, {"error": {"code": "unknown"}}), said(WORD), said(WORD)]
    with ScriptedServer({f"POST {CHAT}": replies}) as server:
        endpoint = Endpoint(session, f"http://127.0.0.1:{server.port}", "m", {})
        maker = await endpoint.calibrated(PromptMaker("1"))
        bodies = server.bodies(f"POST {CHAT}")

    assert maker == PromptMaker("1")
    assert ["stream_options" in body for body in bodies] == [True, False, False]


async def test_a_server_that_does_not_answer_is_trouble(session: aiohttp.ClientSession) -> None:
    with ScriptedServer({}) as server:
        endpoint = Endpoint(session, f"http://127.0.0.1:{server.port}", "m", {})
        with pytest.raises(Trouble, match="does not answer: 404 no such route"):
            await endpoint.calibrated(PromptMaker("1"))
        with pytest.raises(Trouble, match="names no model"):
            await endpoint.first_model()


async def test_the_wait_for_a_connection_counts(session: aiohttp.ClientSession) -> None:
    planned = [Planned(0.0, number, 2, 1) for number in range(4)]
    with ScriptedServer({f"POST {CHAT}": [said(WORD)]}) as server:
        endpoint = Endpoint(session, f"http://127.0.0.1:{server.port}", "m", {})
        ended: list[Seen] = []
        await run(endpoint, planned, PromptMaker("1"), 1, ended)

    firsts = [one.first for one in ended]
    assert firsts == sorted(firsts)
    assert all(b.pieces[0] > a.ended for a, b in itertools.pairwise(ended))


def test_the_command_measures_any_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    replies: dict[str, list[Reply]] = {
        "GET /v1/models": [(200, {"data": [{"id": "theirs"}]})],
        f"POST {CHAT}": [said(OPENING, WORD, WORD, usage(30))],
    }
    with ScriptedServer(replies) as server:
        words = ["--base-url", f"http://127.0.0.1:{server.port}", "--rate", "20,40"]
        words += ["--duration", "0.5", "--key", "secret", "--json", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", ["bench-serve", *words])
        status = bench_serve.main()

    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert status == 0
    assert shown.startswith("theirs at http://127.0.0.1")
    assert json.loads(shown.splitlines()[-1]) == written
    assert [rate["rate"] for rate in written["rates"]] == [20.0, 40.0]
    assert all(rate["ended well"] == rate["planned"] > 0 for rate in written["rates"])
    assert "secret" not in json.dumps(written)


def test_ctrl_c_shows_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def interrupted(_: object, rates: list[Rate]) -> None:
        rates.append(Rate(3.0, 9, [seen([0.1], tokens=1)], 1.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_serve, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", ["bench-serve", "--base-url", "http://127.0.0.1:1"])

    assert bench_serve.main() == 0
    assert "1 of 9" in capsys.readouterr().out


def test_where_nothing_ended_well_the_status_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def failed(_: object, rates: list[Rate]) -> None:
        rates.append(Rate(3.0, 1, [seen([], error="timeout")], 1.0))

    monkeypatch.setattr(bench_serve, "measure", failed)
    monkeypatch.setattr(sys, "argv", ["bench-serve", "--base-url", "http://127.0.0.1:1"])

    assert bench_serve.main() == 1
    assert "1 x timeout" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--model", "m"]])
def test_a_server_that_is_not_there_ends_it_in_words(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench-serve", "--base-url", "http://127.0.0.1:1", *more]
    monkeypatch.setattr(sys, "argv", command)

    assert bench_serve.main() == 1
    said = capsys.readouterr().err
    assert "nothing answers at 127.0.0.1:1" in said
    assert "ClientConnectorError" not in said


@pytest.mark.parametrize("words", [["--rate", "0"], ["--input-tokens", "some"]])
def test_what_cannot_be_meant_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench-serve", *words])

    with pytest.raises(SystemExit):
        bench_serve.arguments()
