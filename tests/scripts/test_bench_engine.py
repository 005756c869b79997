"""What scripts/bench-engine makes of its figures, and our engine in it on a tiny model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import bench_engine
import engine_child
import pytest
from answers import Trouble
from bench_engine import Bench
from children import Late
from engine_child import Timed, prompt
from engine_ours import Engine
from engine_table import OURS, Results, Spread, plain, table

from tiny_models import random_llama, write_gguf


def results() -> Results:
    """Return three rounds of a row, of which a peer missed one."""
    found = Results()
    for number, (ours, theirs) in enumerate([(30.0, 10.0), (20.0, 10.0), (90.0, None)]):
        found.add("1@64, tokens/s", OURS, number, ours)
        if theirs is not None:
            found.add("1@64, tokens/s", "llama.cpp", number, theirs)
    return found


def test_a_ratio_is_the_median_of_the_rounds_that_both_were_in() -> None:
    assert results().ratio("1@64, tokens/s", "llama.cpp") == Spread(2.5, 2.0, 3.0)
    assert results().ratio("1@64, tokens/s", "transformers") is None
    assert results().spread("1@64, tokens/s", OURS) == Spread(30.0, 20.0, 90.0)


def test_the_table_shows_every_row_and_what_was_left_out() -> None:
    found = results()
    found.left_out["32@2048, tokens/s", "transformers"] = "it took more than 180 s"
    found.choosing_shares["llama.cpp"] += [0.01, 0.03, 0.02]
    found.remarks.append("others took 1% of the processors meanwhile")

    lines = list(table(found, ["llama.cpp", "transformers"]))

    assert " ".join(lines[1].split()) == "1@64, tokens/s 30.00 10.00 2.50 (2.00 to 3.00) - -"
    assert lines[2:] == [
        "32@2048, tokens/s: without transformers: it took more than 180 s",
        "llama.cpp: choosing among the logits took 2.00% of its decode steps",
        "others took 1% of the processors meanwhile",
    ]


def test_json_has_what_the_table_has() -> None:
    found = plain(results(), ["llama.cpp"])

    assert json.loads(json.dumps(found)) == found
    row = found["rows"]["1@64, tokens/s"]
    assert row["ratios"]["llama.cpp"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert row[OURS]["median"] == 30.0
    assert found["bandwidth_bytes"] is None


def test_every_engine_gets_the_same_prompts_and_each_prompt_is_another() -> None:
    assert prompt(3, 10) == prompt(3, 64)[:10]
    assert prompt(3, 10) != prompt(4, 10)
    assert all(engine_child.FIRST_ID <= token < engine_child.LAST_ID for token in prompt(1, 999))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "1@63"], "'1@63' is none of prefill, 1@64"),
        (["--peers", "ollama"], "'ollama' is none of llama.cpp, transformers"),
    ],
)
def test_an_unknown_name_is_refused_in_words(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench-engine", *words])

    with pytest.raises(SystemExit):
        bench_engine.arguments()

    assert said in capsys.readouterr().err


class FakeChild:
    """Answers as a child does; ``late`` and ``broken`` name what it does not answer."""

    late: Sequence[str] = ()
    broken: Sequence[str] = ()
    started: list[str]

    def __init__(self, name: str, _script: str, engine: str) -> None:
        self.started.append(name)
        self.engine = engine
        self.process = argparse.Namespace(pid="self")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, what: str, seconds: float | None = None, **details: Any) -> dict[str, Any]:
        if f"{self.engine} {what}" in self.late:
            raise Late(f"{self.engine} took more than {seconds:.0f} s")
        if f"{self.engine} {what}" in self.broken:
            raise Trouble("no memory")
        if what == "load":
            return {"seconds": 2.0, "held_bytes": 2**20, "peak_bytes": 2**21, "version": "1"}
        return {"seconds": 0.5, "tokens": details.get("tokens", 7), "choosing_seconds": None}


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str, **of_child: Sequence[str]
) -> tuple[Results, list[str]]:
    """Run a bench of fake children; return the results and the children that were started."""
    (tmp_path / "model.gguf").touch()
    started: list[str] = []
    child = type("Child", (FakeChild,), {"started": started, **of_child})
    monkeypatch.setattr(bench_engine, "Child", child)
    monkeypatch.setattr(bench_engine, "read_bandwidth", lambda: 3e10)
    monkeypatch.setattr(bench_engine, "cpu_seconds", lambda _: 0.0)
    monkeypatch.setattr(bench_engine, "PEERS", {"llama.cpp": ("json",), "transformers": ("none_",)})
    model = str(tmp_path / "model.gguf")
    monkeypatch.setattr(sys, "argv", ["bench-engine", "--rounds", "2", "--model", model, *words])
    found = Results()
    Bench(bench_engine.arguments(), found).run()
    return found, started


def test_each_round_asks_every_engine_and_a_peer_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, started = run(monkeypatch, tmp_path, "--rows", "prefill,8@64,load")

    assert found.remarks == ["without transformers: none_ is not installed"]
    assert found.values["prefill, tokens/s"]["llama.cpp"] == {1: 1024.0, 2: 1024.0}
    assert found.values["8@64, tokens/s"][OURS] == {1: 14.0, 2: 14.0}
    assert found.values["held, MiB"][OURS] == {0: 1.0, 1: 1.0}
    assert len(found.bandwidths) == 2
    assert len(started) == 2 + 4  # one each that stays, and one each and round for the load


def test_a_cell_that_is_late_is_left_out_and_the_next_one_gets_a_new_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, started = run(
        monkeypatch, tmp_path, "--rows", "prefill,8@64", late=["llama.cpp prefill"]
    )

    assert found.left_out == {("prefill, tokens/s", "llama.cpp"): "llama.cpp took more than 180 s"}
    assert found.values["8@64, tokens/s"]["llama.cpp"] == {1: 14.0, 2: 14.0}
    assert started.count("bench-engine-llama.cpp") == 2


def test_a_cell_that_fails_or_is_not_wanted_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, started = run(
        monkeypatch,
        tmp_path,
        *("--rows", "prefill,8@64,load", "--skip", "ours:prefill"),
        broken=["llama.cpp decode"],
    )

    assert found.left_out["8@64, tokens/s", "llama.cpp"] == "no memory"
    assert found.left_out["prefill, tokens/s", OURS] == "asked for with --skip"
    assert started.count("bench-engine-llama.cpp") == 1
    assert found.values["load, s"].keys() == {OURS, "llama.cpp"}


def test_engines_that_compute_while_they_wait_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, _ = run(monkeypatch, tmp_path, "--rows", "prefill")
    bench = Bench(bench_engine.arguments(), found)
    bench._children["llama.cpp"] = FakeChild.__new__(FakeChild)  # type: ignore[assignment]
    bench._children["llama.cpp"].process = argparse.Namespace(pid=1)  # type: ignore[assignment]
    seconds = iter([0.0, 1e9])
    monkeypatch.setattr(bench_engine, "cpu_seconds", lambda _: next(seconds))
    with bench._others_idle(OURS):
        pass

    assert "engines that waited computed" in found.remarks[-1]


def test_a_model_that_is_not_here_is_trouble() -> None:
    with pytest.raises(Trouble, match="nonsense"):
        bench_engine.model_file("nonsense")


def test_a_file_is_written_anew_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class Writer(FakeChild):
        started: list[str] = []  # noqa: RUF012 - only to be filled

        def ask(self, what: str, seconds: float | None = None, **details: Any) -> dict[str, Any]:
            asked.append((what, seconds))
            Path(details["target"]).write_text(details["quant"])
            return {}

    monkeypatch.setattr(bench_engine, "Child", Writer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    paths = {bench_engine.requantised(Path("/models/tiny.Q4_1.gguf"), "Q4_0") for _ in range(2)}

    assert [(path.name, path.read_text()) for path in paths] == [("tiny.Q4_1-as-Q4_0.gguf", "Q4_0")]
    assert asked == [("requantise", None)]


def test_our_engine_loads_and_decodes_as_a_device_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_child, "FIRST_ID", 1)
    monkeypatch.setattr(engine_child, "LAST_ID", 90)
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_0")
    engine = Engine()
    engine.load(tmp_path / "tiny.gguf", 1, 4, 128)

    token = engine.prefill(prompt(7, 40))
    timed = engine.decode(3, 16, 5)

    assert token == engine.prefill(prompt(7, 40))
    assert timed == Timed(timed.seconds, 15)
    assert timed.seconds > 0
    assert engine.decode(1, 16, 5).tokens == 5
