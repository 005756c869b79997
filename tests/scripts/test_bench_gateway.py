"""The client, the arithmetic and a small run of scripts/bench-gateway."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import bench_gateway
import gateway_load
import processes
import pytest
from answers import Address, Trouble
from bench_gateway import ADDED, Round, figures, print_table, quantile
from gateway_litellm import LiteLlm, settings
from gateway_load import CHAT, Answer, ask, chat, request
from local_neuron import until

from scripted_server import ScriptedServer

SCRIPTS = Path(bench_gateway.__file__).parent
NODE = Address("127.0.0.1", 1)
FAKE_PEER = f"""#!{sys.executable}
import asyncio, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import stub_node
stub_node.FLEET[b"/health/liveliness"] = stub_node.as_json("alive")
async def main():
    port = int(sys.argv[sys.argv.index("--port") + 1])
    await (await stub_node.serve(["127.0.0.1"], port, 0.001)).serve_forever()
asyncio.run(main())
"""


@pytest.mark.parametrize("body_bytes", [1_000, 200_000])
def test_a_request_has_about_the_bytes_that_were_asked_for(body_bytes: int) -> None:
    body = chat("m", body_bytes, 3, stream=True)

    assert len(json.dumps(body)) == pytest.approx(body_bytes, rel=0.15)
    assert request(NODE, "sk-1", body).endswith(json.dumps(body).encode())
    assert body["stream"] is True


def test_sessions_begin_differently() -> None:
    assert chat("m", 1_000, 1)["messages"][0] != chat("m", 1_000, 2)["messages"][0]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n", b"\r\n", b"word", b"word"],
        [b"HTTP/1.1 200 OK\r\nX-Id: 10\r\n\r\n", b"8\r\nwordword\r\n", b"0\r\n\r\n"],
    ],
    ids=["of a known length", "in pieces, after a head that ends in 0"],
)
def test_an_answer_is_whole_with_its_last_piece(pieces: list[bytes]) -> None:
    answer, seen = Answer(), []

    for piece in pieces:
        answer.take(piece)
        seen.append(answer.is_whole)

    assert seen == [False] * (len(pieces) - 1) + [True]
    assert answer.words == 2


def test_an_answer_begins_with_its_body() -> None:
    answer = Answer()

    answer.take(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
    before = answer.has_begun
    answer.take(b"w")

    assert (before, answer.has_begun) == (False, True)


def test_every_request_is_answered_and_counted() -> None:
    with ScriptedServer({f"POST {CHAT}": [(200, {"text": "word word"})]}) as server:
        place = Address("127.0.0.1", server.port)
        ended = ask(place, [request(place, "sk-1", {"n": n}) for n in range(3)], 3)

    assert [each.words for each in ended] == [2] * 3
    assert all(0 < each.first <= each.seconds for each in ended)


def test_a_refusal_is_trouble() -> None:
    with ScriptedServer({f"POST {CHAT}": [(503, {"error": "busy"})]}) as server:
        place = Address("127.0.0.1", server.port)

        with pytest.raises(Trouble, match=r"refused: .*503"):
            ask(place, [request(place, "sk-1", {})], 1)


def test_a_connection_that_is_not_kept_is_trouble() -> None:
    with ScriptedServer({f"POST {CHAT}": [(200, {"text": "word"})]}) as server:
        place = Address("127.0.0.1", server.port)

        with pytest.raises(Trouble, match="broke off"):
            ask(place, [request(place, "sk-1", {})], 2)


def test_silence_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_load, "PATIENCE_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as nobody_accepts:
        place = Address("127.0.0.1", nobody_accepts.getsockname()[1])

        with pytest.raises(Trouble, match="is silent; 0 of 1 answers came"):
            ask(place, [request(place, "sk-1", {})], 1)


def a_round(direct: float, cortex: float, peer: float | None = None) -> Round:
    """Return a round in which all latencies are these, and the rest of cortex half the peer's."""
    rest = {"requests/s": 5.0, "CPU of a request": 1.0, "streams, s": 2.0, "CPU of a chunk": 1.0}
    found = {
        "direct": dict.fromkeys(ADDED, direct),
        "cortex": dict.fromkeys(ADDED, cortex) | rest,
    }
    if peer is not None:
        twice = {name: value * 2 for name, value in rest.items()}
        found["LiteLLM"] = dict.fromkeys(ADDED, peer) | twice
    return found


def test_what_is_added_is_told_round_by_round() -> None:
    found = figures([a_round(1, 2), a_round(5, 8), a_round(1, 3)])

    assert found["medians"]["cortex"]["1 kB, p50"] == 3
    assert found["added"]["cortex"]["1 kB, p50"] == {"median": 2, "least": 1, "most": 3}
    assert "cortex / LiteLLM" not in found


def test_ratios_of_latencies_are_of_what_was_added() -> None:
    found = figures([a_round(1, 2, 11), a_round(1, 3, 11)])["cortex / LiteLLM"]

    assert found["1 kB, p99"]["most"] == pytest.approx(0.2)
    assert found["1 kB, p99"]["median"] == pytest.approx(0.15)
    assert found["CPU of a request"]["median"] == 0.5


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(200, 0, -1)]

    assert (quantile(values, 50), quantile(values, 99), quantile([7.0], 99)) == (101, 199, 7)


def test_without_a_peer_the_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"machine": "m", "date": "d", "concurrency": 1, "tokens": 1, "word_ms": 1, "rounds": 1}

    print_table({**about, **figures([a_round(1, 2)]), "memory, MiB": {"cortex": 45.0}})

    assert "LiteLLM was left out" in capsys.readouterr().out


def test_the_peer_gets_both_nodes_and_no_database() -> None:
    written = settings("stub", [NODE, NODE], "sk-1")

    assert [model["model_name"] for model in written["model_list"]] == ["stub", "stub"]
    assert written["general_settings"] == {"master_key": "sk-1"}


def test_a_peer_that_is_not_there_is_trouble(tmp_path: Path) -> None:
    with pytest.raises(Trouble, match="cannot be run: No such file"):
        LiteLlm(tmp_path / "litellm", "stub", [NODE], "sk-1")


def test_a_peer_that_ends_is_trouble(tmp_path: Path) -> None:
    program = tmp_path / "litellm"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)

    with LiteLlm(program, "stub", [NODE], "sk-1") as peer:
        peer.process.wait()

        with pytest.raises(Trouble, match="ended with 3; log: "):
            peer.wait_until_serving()


def test_processor_time_is_told_in_parts_of_a_tick() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        until(lambda: processes.status_of(child.pid)["State"].startswith("S"), "it to wait")

        told = processes.scheduled_seconds(child.pid)
        ticks = told * os.sysconf("SC_CLK_TCK")

    assert 0 < ticks != round(ticks)


def test_a_small_run_measures_everything_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peer = tmp_path / "litellm"
    peer.write_text(FAKE_PEER)
    peer.chmod(0o755)
    options = "--rounds 1 --requests 3 --open-requests 9 --concurrency 3 --tokens 5 --word-ms 1"
    monkeypatch.setattr("sys.argv", ["bench-gateway", *options.split(), "--peer", str(peer)])
    monkeypatch.setattr(bench_gateway, "WARMING_REQUESTS", 6)
    monkeypatch.setattr(bench_gateway, "FIRST_BYTES", 2)

    status = bench_gateway.main()

    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    *table, last = shown.out.splitlines()
    found = json.loads(last)
    assert found["medians"].keys() == {"direct", "cortex", "LiteLLM"}
    assert found["medians"]["cortex"].keys() == found["cortex / LiteLLM"].keys()
    assert all(value > 0 for value in found["medians"]["cortex"].values())
    assert found["memory, MiB"].keys() == {"cortex", "LiteLLM"}
    assert any(line.startswith("CPU of a chunk, us") for line in table)


def test_an_answer_with_too_few_words_is_trouble() -> None:
    with (
        ScriptedServer({f"POST {CHAT}": [(200, {"text": "word"})]}) as server,
        pytest.raises(Trouble, match="has 1 words, not 16"),
    ):
        bench_gateway.several(bench_gateway.Way(Address("127.0.0.1", server.port)), 1_000, 1, 1)


def test_a_run_that_cannot_begin_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object) -> None:
        raise Trouble("no port is free")

    monkeypatch.setattr("sys.argv", ["bench-gateway"])
    monkeypatch.setattr(bench_gateway, "started", started)

    assert bench_gateway.main() == 1
    assert capsys.readouterr().err == "bench-gateway: no port is free\n"
