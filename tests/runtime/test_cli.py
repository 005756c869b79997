"""The command ``neuron``: help that teaches, and one sentence for whatever is in the way."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cortex.ipc.taps import SUPERVISOR, Tap
from cortex.runtime import cli, fork_server, serving
from cortex.runtime.config import DeviceConfig, NeuronConfig
from cortex.runtime.serving import bind

NEURON = [sys.executable, "-m", "cortex.runtime"]
runner = CliRunner()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[NeuronConfig]:
    """Collect the configurations that ``serve`` would run, instead of running them."""
    configs: list[NeuronConfig] = []
    monkeypatch.setattr(fork_server, "prepare", lambda: None)
    monkeypatch.setattr(serving, "serve", configs.append)
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)
    return configs


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["tap", "--help"], ["check", "--help"]]
)
def test_help_shows_examples(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)

    assert result.exit_code == 0
    assert "\n  neuron " in result.output.replace("    neuron", "  neuron")


def test_the_version_is_shown() -> None:
    assert runner.invoke(cli.app, ["--version"]).output.startswith("neuron ")


def test_options_become_the_configuration(served: list[NeuronConfig]) -> None:
    arguments = ["--listen", "127.0.0.1:1", "--devices", "cpu:0,cpu:1", "--model", "a"]

    result = runner.invoke(cli.app, ["serve", *arguments, "--model", "b", "--log-level", "debug"])

    assert result.exit_code == 0, result.output
    assert (served[0].listen, served[0].log_level) == ("127.0.0.1:1", "debug")
    assert served[0].devices == [DeviceConfig("cpu:0"), DeviceConfig("cpu:1")]
    assert [model.model_id for model in served[0].models] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "/nonexistent.toml"], "cannot read /nonexistent.toml"),
        (["--listen", "here"], "the command line: listen: expected HOST:PORT"),
        (["--devices", "tpu:0"], "devices[0].name"),
        (["--log-level", "loud"], "log_level"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_and_exit_2(arguments: list[str], words: str) -> None:
    result = runner.invoke(cli.app, ["serve", *arguments])

    assert result.exit_code == 2
    assert result.output.startswith("neuron: ")
    assert words in result.output
    assert result.output.count("\n") == 1


def test_a_hub_that_cannot_be_meant_is_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)

    for arguments in (["serve"], ["check", "org/name"]):
        result = runner.invoke(cli.app, [*arguments, "--devices", "cpu:0"])

        assert result.exit_code == 2
        assert result.output.startswith("neuron: HF_ENDPOINT: 'huggingface.co'")


def test_a_port_that_is_taken_is_one_sentence_and_exit_1() -> None:
    with bind("127.0.0.1", 0) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = subprocess.run(
            [*NEURON, "serve", "--listen", listen, "--devices", "cpu:0"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"neuron: cannot listen on {listen}: ")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_before_the_loop_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: NeuronConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "serve", interrupted)
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)

    result = runner.invoke(cli.app, ["serve"])

    assert (result.exit_code, result.output) == (130, "")


def test_importing_the_entry_point_does_nothing() -> None:
    code = "import sys, cortex.runtime.__main__; sys.exit('cortex.runtime.cli' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_whole_supervisor_imports_no_torch() -> None:
    code = "import sys, cortex.runtime.serving; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tap_without_a_neuron_is_one_sentence(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["tap", "--directory", str(tmp_path)])

    assert result.exit_code == 1
    assert result.output.startswith(f"neuron: no neuron publishes in {tmp_path}")
    assert "--listen HOST:PORT, or NEURON_LISTEN" in result.output


def test_a_tap_is_asked_for_the_neuron_that_listens_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    result = runner.invoke(cli.app, ["tap", "--listen", "127.0.0.1:8123"])

    assert "taps-8123:" in result.output


@pytest.mark.parametrize("topic", ["requests", "command.lod_model", "Step"])
def test_a_topic_that_is_none_is_answered_with_those_there_are(topic: str) -> None:
    result = runner.invoke(cli.app, ["tap", "step", topic])

    assert result.exit_code == 2
    assert result.output.startswith(f"neuron: there is no topic {topic!r}")
    assert all(word in result.output for word in ("request", "step", "event.model_loaded"))


def test_the_help_of_a_tap_names_the_topics() -> None:
    words = runner.invoke(cli.app, ["tap", "--help"]).output

    assert "Topics are request, step, command.NAME and event.NAME" in words


def test_a_tap_with_a_wrong_configuration_is_exit_2() -> None:
    result = runner.invoke(cli.app, ["tap", "--config", "/nonexistent.toml"])

    assert result.exit_code == 2


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    """The publishing end of a neuron's tap."""
    tap = Tap(tmp_path, SUPERVISOR)
    yield tap
    tap.close()


def test_a_tap_prints_what_happens_until_ctrl_c(tap: Tap, tmp_path: Path) -> None:
    command = [*NEURON, "tap", "request", "--directory", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as listener:
        assert listener.stdout is not None
        assert listener.stderr is not None
        while not tap.wants("request"):  # the subscription is on its way
            os.sched_yield()
        tap.publish("request", {"status": 200})
        line = listener.stdout.readline()
        listener.send_signal(signal.SIGINT)
        assert listener.wait(timeout=30) == 0
        assert listener.stderr.read() == ""

    assert line == 'request {"process":"supervisor","message":{"status":200}}\n'


def test_a_tap_whose_reader_left_ends_quietly(tap: Tap, tmp_path: Path) -> None:
    command = [*NEURON, "tap", "--directory", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as listener:
        assert listener.stdout is not None
        assert listener.stderr is not None
        while not tap.wants("request"):
            os.sched_yield()
        listener.stdout.close()
        tap.publish("request", {})
        tap.publish("request", {})
        assert listener.wait(timeout=30) == 0
        assert listener.stderr.read() == ""
