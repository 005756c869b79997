"""A script in a process of its own, and its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import children
import pytest
from answers import Trouble
from children import Child, Late, answer

ECHO = """
import sys
sys.path.insert(0, {scripts!r})
from answers import Trouble
from children import answer_questions

def echo(**said):
    print("noise of a library")
    return said

def refuse():
    raise Trouble("no such thing")

def hang():
    import time
    time.sleep(600)

def vanish():
    raise SystemExit

answer_questions(dict(echo=echo, refuse=refuse, hang=hang, vanish=vanish))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(children, "LOGS", tmp_path)
    path = tmp_path / "echo.py"
    path.write_text(ECHO.format(scripts=str(children.SCRIPTS)), encoding="utf-8")
    return str(path)


def test_a_child_answers_what_it_is_asked_and_keeps_noise_apart(script: str) -> None:
    with Child("echo", script) as child:
        answers: list[Any] = [child.ask("echo", number=number) for number in range(2)]

    assert answers == [{"number": 0}, {"number": 1}]
    assert child.process.returncode == 0
    assert child.log.read_text().count("noise of a library") == 2


def test_what_a_child_refuses_is_trouble_and_it_goes_on(script: str) -> None:
    with Child("echo", script) as child:
        with pytest.raises(Trouble, match="echo: no such thing"):
            child.ask("refuse")
        assert child.ask("echo", number=1) == {"number": 1}


def test_a_child_that_is_late_is_killed(script: str) -> None:
    with Child("echo", script) as child, pytest.raises(Late, match="more than 0 s"):
        child.ask("hang", 0.01)

    assert child.process.returncode == -9


def test_a_child_that_ends_is_trouble(script: str) -> None:
    with Child("echo", script) as child:
        with pytest.raises(Trouble, match="ended without an answer"):
            child.ask("vanish")
        child.process.wait()
        with pytest.raises(Trouble, match="not there any more"):
            child.ask("echo")


def test_a_child_that_does_not_stop_is_killed(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STOP_SECONDS", 0.05)
    with Child("echo", script) as child:
        assert child.process.stdin is not None
        child.process.stdin.write(json.dumps(["hang", {}]).encode() + b"\n")
        child.process.stdin.flush()

    assert child.process.returncode == -9


def test_an_answer_is_one_line() -> None:
    assert answer({"add": lambda a, b: {"sum": a + b}}, '["add", {"a": 1, "b": 2}]') == (
        '{"sum": 3}\n'
    )
