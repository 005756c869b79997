"""``scripts/validate-neuron.sh`` against a neuron that answers what the test wrote down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripted_server import Reply, ScriptedServer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "validate-neuron.sh"
MODEL = "smollm2-135m-instruct"
HEALTH, MODELS, LOAD, CHAT = (
    "GET /health",
    "GET /models",
    "POST /models/load",
    "POST /v1/chat/completions",
)
READY: Reply = (200, {"activation": {"state": "ready"}})
PARIS = {"choices": [{"message": {"role": "assistant", "content": "The capital is PARIS."}}]}

pytestmark = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")),
    reason="curl or jq is not installed: validate-neuron.sh was not run",
)


def models(status: str, model: str = MODEL, **more: Any) -> Reply:
    """Return a listing with one model."""
    return 200, [
        {"id": "another/model", "status": "loaded"},
        {"id": model, "status": status, **more},
    ]


def neuron(**replies: Sequence[Reply]) -> ScriptedServer:
    """Return a neuron that is ready, has the model loaded and knows the answer, unless told."""
    script: dict[str, Sequence[Reply]] = {
        HEALTH: replies.get("health", [READY]),
        MODELS: replies.get("models", [models("loaded")]),
        LOAD: replies.get("load", [(202, {"status": "loading"})]),
        CHAT: replies.get("chat", [(200, PARIS)]),
    }
    return ScriptedServer(script)


def run(server: ScriptedServer, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the script against *server*, with *arguments* after the host."""
    return subprocess.run(
        [SCRIPT, "127.0.0.1", *arguments],
        env={"PATH": os.environ["PATH"], "NEURON_PORT": str(server.port), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_neuron_that_names_paris_passes() -> None:
    with neuron() as server:
        ended = run(server)

    assert ended.returncode == 0
    assert ended.stderr.splitlines()[-1] == "[127.0.0.1] PASS"


def test_stdout_is_the_raw_answer_and_nothing_else() -> None:
    with neuron() as server:
        ended = run(server)

    assert json.loads(ended.stdout) == PARIS


def test_status_lines_name_the_host() -> None:
    with neuron() as server:
        ended = run(server)

    assert all(line.startswith("[127.0.0.1] ") for line in ended.stderr.splitlines())


def test_the_question_is_asked_at_temperature_0() -> None:
    with neuron() as server:
        run(server)

    [asked] = server.bodies(CHAT)
    assert (asked["model"], asked["temperature"]) == (MODEL, 0)
    assert "What is the capital of France?" in asked["messages"][0]["content"]


def test_a_loaded_model_is_not_loaded_again() -> None:
    with neuron() as server:
        run(server)

    assert server.bodies(LOAD) == []


def test_an_activation_under_way_is_waited_for() -> None:
    warming = (200, {"activation": {"state": "pre_warming", "in_progress": "org/big"}})
    with neuron(health=[warming, READY]) as server:
        ended = run(server)

    assert ended.returncode == 0
    assert "loading org/big" in ended.stderr


def test_a_model_that_is_not_there_is_loaded_and_waited_for() -> None:
    halfway = models(
        "loading", progress={"phase": "downloading", "bytes_done": 5, "bytes_total": 9}
    )
    with neuron(models=[(200, []), halfway, models("loaded")]) as server:
        ended = run(server)

    assert ended.returncode == 0
    assert "is loading downloading 5 of 9 bytes" in ended.stderr
    assert len(server.bodies(LOAD)) == 1


def test_the_embedded_model_is_loaded_with_its_quantisation() -> None:
    with neuron(models=[(200, []), models("loaded")]) as server:
        run(server)

    expected = {"model_id": MODEL, "harness": "torch", "devices": [0], "quant": "Q4_1"}
    assert server.bodies(LOAD) == [expected]


def test_an_explicit_empty_third_argument_means_dense() -> None:
    with neuron(models=[(200, []), models("loaded")]) as server:
        run(server, MODEL, "")

    [asked] = server.bodies(LOAD)
    assert "quant" not in asked


def test_another_model_has_no_default_quantisation() -> None:
    with neuron(models=[(200, []), models("loaded", "org/other")]) as server:
        ended = run(server, "org/other")

    [asked] = server.bodies(LOAD)
    assert (ended.returncode, asked["model_id"]) == (0, "org/other")
    assert "quant" not in asked


def test_a_quantisation_that_is_given_is_passed_on() -> None:
    with neuron(models=[(200, []), models("loaded", "org/other")]) as server:
        run(server, "org/other", "Q8_0")

    assert server.bodies(LOAD)[0]["quant"] == "Q8_0"


def test_tensor_parallel_takes_the_first_devices() -> None:
    with neuron(models=[(200, []), models("loaded")]) as server:
        run(server, MODEL, "", "2")

    [asked] = server.bodies(LOAD)
    assert (asked["tensor_parallel"], asked["devices"]) == (2, [0, 1])


def test_devices_of_the_environment_are_used() -> None:
    with neuron(models=[(200, []), models("loaded")]) as server:
        run(server, NEURON_DEVICES="2,3")

    assert server.bodies(LOAD)[0]["devices"] == [2, 3]


def test_devices_that_are_no_list_are_refused() -> None:
    with neuron() as server:
        ended = run(server, NEURON_DEVICES="cpu:0")

    assert ended.returncode == 1
    assert "FAIL: NEURON_DEVICES is not a list like 0,1: cpu:0" in ended.stderr


@pytest.mark.parametrize("number", ["two", "0", "-1"])
def test_a_number_that_is_none_is_refused(number: str) -> None:
    with neuron() as server:
        ended = run(server, MODEL, "", number)

    assert ended.returncode == 1
    assert f"FAIL: not a positive number: {number}" in ended.stderr


def test_a_refused_load_fails_with_the_neurons_words() -> None:
    refusal = (422, {"error": {"message": "no such quantisation", "kind": "quant_not_found"}})
    with neuron(models=[(200, [])], load=[refusal]) as server:
        ended = run(server)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert "FAIL: POST /models/load: 422" in ended.stderr
    assert "quant_not_found" in ended.stderr


def test_a_load_that_fails_fails_with_its_reason() -> None:
    failed = models("failed", failure="the disk is full")
    with neuron(models=[(200, []), models("loading"), failed]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert f"FAIL: {MODEL} is failed: the disk is full" in ended.stderr


def test_a_load_that_failed_before_is_tried_again() -> None:
    with neuron(models=[models("failed", failure="no network"), models("loaded")]) as server:
        ended = run(server)

    assert ended.returncode == 0
    assert len(server.bodies(LOAD)) == 1


@pytest.mark.parametrize("status", ["loading", "recovering", "unloading"])
def test_a_model_that_somebody_else_moves_is_waited_for(status: str) -> None:
    with neuron(models=[models(status), models("loaded")]) as server:
        ended = run(server)

    assert ended.returncode == 0
    assert server.bodies(LOAD) == []


def test_a_load_without_end_is_given_up() -> None:
    with neuron(models=[models("loading")]) as server:
        ended = run(server, NEURON_LOAD_TIMEOUT="1")

    assert ended.returncode == 1
    assert f"FAIL: {MODEL} is not loaded within 1 s" in ended.stderr


def test_an_answer_without_paris_fails_and_is_shown() -> None:
    wrong = {"choices": [{"message": {"content": "London, of course."}}]}
    with neuron(chat=[(200, wrong)]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert json.loads(ended.stdout) == wrong
    assert "FAIL: the answer does not name Paris" in ended.stderr


def test_an_answer_without_text_fails() -> None:
    with neuron(chat=[(200, {"choices": [{"message": {"content": None}}]})]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert "FAIL: a text is not in the answer" in ended.stderr


def test_a_refused_question_fails_with_the_neurons_words() -> None:
    with neuron(chat=[(503, {"error": {"code": "overloaded"}})]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert 'FAIL: POST /v1/chat/completions: 503 {"error": {"code": "overloaded"}}' in ended.stderr


def test_an_unhealthy_neuron_fails() -> None:
    with neuron(health=[(503, {"error": {"code": "shutting_down"}})]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert "FAIL: GET /health: 503" in ended.stderr


def test_a_health_without_activation_fails() -> None:
    with neuron(health=[(200, {})]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert "FAIL: .activation.state is not in the answer" in ended.stderr


@pytest.mark.parametrize("listing", [(200, {"data": []}), (200, b"<html>")])
def test_a_listing_of_another_shape_fails(listing: Reply) -> None:
    with neuron(models=[listing]) as server:
        ended = run(server)

    assert ended.returncode == 1
    assert "FAIL: GET /models is not a list of models" in ended.stderr


def test_a_neuron_that_does_not_answer_fails() -> None:
    server = neuron()
    with server:
        pass  # its port is closed now

    ended = run(server)

    assert ended.returncode == 1
    assert "FAIL: GET /health: 000" in ended.stderr


def test_a_host_with_its_port_is_told_where_ports_go() -> None:
    ended = subprocess.run([SCRIPT, "alpha.lan:4000"], capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert f"without a port: NEURON_PORT=4000 {SCRIPT} alpha.lan" in ended.stderr


@pytest.mark.parametrize("missing", ["curl", "jq"])
def test_a_missing_tool_is_named(missing: str, tmp_path: Path) -> None:
    for tool in {"bash", "curl", "jq"} - {missing}:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))

    with neuron() as server:
        ended = run(server, PATH=str(tmp_path))

    assert ended.returncode == 1
    assert f"FAIL: needs {missing}, which is not installed" in ended.stderr


def test_the_help_says_what_the_arguments_mean() -> None:
    ended = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)

    for word in ("[host] [model] [quant] [tensor_parallel]", "NEURON_PORT", "NEURON_LOAD_TIMEOUT"):
        assert word in ended.stdout
