"""The commands an operator types, against a real stack."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from stack import MODEL, Stack, until

ROOT = Path(__file__).resolve().parents[2]


def cortex(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cortex.gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_validate_neuron_passes_against_a_real_neuron(stack: Stack) -> None:
    port = stack.neuron_url.rpartition(":")[2]

    result = subprocess.run(
        [ROOT / "scripts" / "validate-neuron.sh", "127.0.0.1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "NEURON_PORT": port},
    )

    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert all(line.startswith("[127.0.0.1]") for line in result.stderr.splitlines())


def test_status_shows_the_model_and_where_it_is(stack: Stack) -> None:
    result = cortex("status", "--endpoint", stack.url)

    assert result.returncode == 0, result.stderr
    assert MODEL in result.stdout
    assert "loaded" in result.stdout


def test_status_as_json_is_json(stack: Stack) -> None:
    result = cortex("status", "--endpoint", stack.url, "--json")

    assert result.returncode == 0, result.stderr
    assert MODEL in str(msgspec.json.decode(result.stdout))


def test_chat_streams_an_answer(stack: Stack) -> None:
    question = "What is the capital of France?"

    result = cortex("chat", "--endpoint", stack.url, "--model", MODEL, question)

    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_tap_prints_what_happens_as_it_happens(stack: Stack, tmp_path: Path) -> None:
    port = stack.neuron_url.rpartition(":")[2]
    output = tmp_path / "tap"
    with output.open("wb") as file:
        tap = subprocess.Popen(
            [sys.executable, "-m", "cortex.runtime", "tap", "step"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NEURON_LISTEN": f"127.0.0.1:{port}"},
        )
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}

    def has_seen_a_step() -> bool:
        stack.post("/v1/chat/completions", body)
        assert tap.poll() is None, output.read_text()
        return "cpu:0" in output.read_text()

    until(has_seen_a_step, "a step in the tap")
    tap.send_signal(signal.SIGINT)

    assert tap.wait(10) in {0, 130}
    assert "Traceback" not in output.read_text()


def test_the_doctor_finds_the_stack_well_but_its_context_small(stack: Stack) -> None:
    result = cortex("doctor", "--endpoint", stack.url, "--client", "all", "--json")

    report = msgspec.json.decode(result.stdout)
    found = {f"{it['client']}: {it['check']}": it for it in report["findings"]}
    assert [it for it in found.values() if it["outcome"] == "fail"] == []
    too_small = {"claude-code: context", "codex: context", "opencode: context"}
    assert (result.returncode, report["ok"], report["model"]) == (1, False, MODEL)
    assert {name for name, it in found.items() if it["outcome"] != "pass"} == {
        *too_small,
        "claude-code: model discovery",
        "openai: embeddings",
        "zed: edit prediction: suffix",
    }
    missed = {name for name, it in found.items() if it["outcome"] != "pass" and it["needed"]}
    assert missed == too_small
