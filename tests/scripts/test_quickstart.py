"""``scripts/quickstart`` with a fake installation and a fake ``cortex up``."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stack import is_alive, until

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--listen", "--neuron-listen", "--metrics-listen")
FREE = [text for option in OPTIONS for text in (option, "127.0.0.1:0")]
INSTALL = """#!/bin/bash
cd "$(dirname "$0")/.."
if [[ $1 == --python ]]; then echo {python}; exit; fi
if [[ -n $INSTALL_FAILS ]]; then echo "install: no network" >&2; exit 1; fi
mkdir -p .venv/bin
printf '#!/bin/bash\\nexec {python} {fake} "$@"\\n' > .venv/bin/cortex
chmod +x .venv/bin/cortex
"""


class Clone:
    """A bare clone whose installation takes no time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        scripts = root / "scripts"
        scripts.mkdir(parents=True)
        for name in ("quickstart", "quickstart.py", "answers.py"):
            shutil.copy(ROOT / "scripts" / name, scripts)
        fake = ROOT / "tests" / "fake_cortex.py"
        (scripts / "install").write_text(INSTALL.format(python=sys.executable, fake=fake))
        (scripts / "install").chmod(0o755)
        self._pid = root / "pid"

    def start(
        self, *arguments: str, prefix: Sequence[str] = (), **env: str
    ) -> subprocess.Popen[str]:
        """Start the quickstart, on ports that are free."""
        command = [*prefix, str(self.root / "scripts" / "quickstart"), *FREE]
        return subprocess.Popen(
            [*command, *arguments],
            env=os.environ | {"FAKE_CORTEX_PID": str(self._pid)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        """Run it to its end; return status, stdout and stderr."""
        with self.start(*arguments, **env) as process:
            try:
                output, errors = process.communicate(timeout=30)
            finally:
                process.kill()
        return process.returncode, output, errors

    @property
    def is_left_running(self) -> bool:
        """Whether ``cortex up`` lives."""
        return self._pid.exists() and is_alive(int(self._pid.read_text()))

    @property
    def was_started(self) -> bool:
        """Whether ``cortex up`` was ever started."""
        return self._pid.exists()


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    """A clone; whatever a failed test leaves running is ended."""
    fresh = Clone(tmp_path / "clone")
    yield fresh
    if fresh.is_left_running:
        os.kill(int((fresh.root / "pid").read_text()), signal.SIGKILL)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what the process printed up to a line that contains *text*."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"it ended without {text!r}: {printed}")


def test_four_answers_name_paris(clone: Clone) -> None:
    status, output, errors = clone.run("--exit")

    answers = [line for line in output.splitlines() if "Paris" in line]
    assert (status, errors) == (0, "")
    assert [line.split()[:2] for line in answers] == [
        ["OpenAI", "whole"],
        ["OpenAI", "streamed"],
        ["Anthropic", "whole"],
        ["Anthropic", "streamed"],
    ]


def test_each_answer_is_timed(clone: Clone) -> None:
    _, output, _ = clone.run("--exit")

    assert output.count("tokens/s") == 4
    assert output.count("first token after") == 2


def test_the_progress_of_the_load_is_shown(clone: Clone) -> None:
    _, output, _ = clone.run("--exit")

    assert "downloading and unpacking smollm2-135m-instruct" in output


def test_exit_leaves_nothing_running(clone: Clone) -> None:
    clone.run("--exit")

    assert clone.was_started
    assert not clone.is_left_running


def test_it_says_where_to_point_clients_and_stays_up_until_ctrl_c(clone: Clone) -> None:
    with clone.start() as process:
        printed = read_until(process, "Ctrl-C stops it")
        stayed = clone.is_left_running
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)

    assert stayed
    assert (process.returncode, errors) == (0, "")
    assert not clone.is_left_running
    for word in ("curl http://127.0.0.1:", "OpenAI(", "ANTHROPIC_BASE_URL=http", "Codex"):
        assert word in printed


def test_sigint_is_heard_where_a_shell_started_it_in_the_background(clone: Clone) -> None:
    in_background = ("bash", "-c", 'trap "" INT; exec "$0" "$@"')

    with clone.start(prefix=in_background) as process:
        read_until(process, "Ctrl-C stops it")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)

    assert process.returncode == 0
    assert not clone.is_left_running


def test_sigterm_stops_it_like_ctrl_c(clone: Clone) -> None:
    with clone.start() as process:
        read_until(process, "Ctrl-C stops it")
        process.terminate()
        process.communicate(timeout=30)

    assert not clone.is_left_running


def test_a_second_ctrl_c_ends_what_does_not_stop(clone: Clone) -> None:
    with clone.start(FAKE_CORTEX="ignores-sigterm") as process:
        read_until(process, "Ctrl-C stops it")
        process.send_signal(signal.SIGINT)
        read_until(process, "stopping")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)

    assert not clone.is_left_running


def test_a_killed_quickstart_takes_the_daemons_with_it(clone: Clone) -> None:
    with clone.start() as process:
        read_until(process, "Ctrl-C stops it")
        process.kill()

    until(lambda: not clone.is_left_running, "the end of the daemons")


@pytest.mark.parametrize("option", OPTIONS)
def test_a_taken_port_is_one_sentence_that_names_the_option(clone: Clone, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, output, errors = clone.run(option, f"127.0.0.1:{port}")

    sentence = f"port {port} is taken by another program; choose one with {option}."
    assert (status, output) == (1, "")
    assert errors == f"quickstart: {sentence}\n"
    assert not (clone.root / ".venv").exists()  # nothing was installed first


def test_an_address_of_another_machine_is_one_sentence(clone: Clone) -> None:
    status, _, errors = clone.run("--listen", "192.0.2.1:31313")

    assert status == 1
    assert "cannot listen on 192.0.2.1:31313 (--listen)" in errors


@pytest.mark.parametrize("text", ["31313", "localhost:", "localhost:http", "localhost:70000"])
def test_what_is_no_address_is_refused(clone: Clone, text: str) -> None:
    status, _, errors = clone.run("--listen", text)

    assert status == 2
    assert f"'{text}' is not HOST:PORT" in errors


def test_a_failed_installation_speaks_for_itself(clone: Clone) -> None:
    status, output, errors = clone.run(INSTALL_FAILS="1")

    assert (status, output, errors) == (1, "", "install: no network\n")
    assert not clone.was_started


@pytest.mark.parametrize(
    ("manner", "sentence"),
    [
        ("fails-to-start", "cortex up ended with status 1: cortex: no such device: cpu:9; log: "),
        ("fails-to-load", "cannot be loaded: the package index is unreachable; log: "),
        ("knows-nothing", "the whole answer of /v1/chat/completions does not name Paris."),
        ("breaks-off", "broke off: {'message': 'the device process died'}"),
        ("speaks-gibberish", "gave an answer of an unknown shape: KeyError('choices')."),
        ("dies-when-asked", "RemoteDisconnected"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_nothing_is_left_running(
    clone: Clone, manner: str, sentence: str
) -> None:
    status, _, errors = clone.run(FAKE_CORTEX=manner)

    assert status == 1
    assert sentence in errors
    assert len(errors.splitlines()) == 1
    assert not clone.is_left_running


def test_a_stack_that_ends_later_is_said(clone: Clone) -> None:
    with clone.start() as process:
        read_until(process, "Ctrl-C stops it")
        os.kill(int((clone.root / "pid").read_text()), signal.SIGKILL)
        _, errors = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "cortex up was killed by signal 9; log: " in errors


def test_a_stack_that_says_why_it_stopped_is_quoted(clone: Clone) -> None:
    with clone.start(FAKE_CORTEX="loses-its-neuron") as process:
        read_until(process, "Ctrl-C stops it")
        os.kill(int((clone.root / "pid").read_text()), signal.SIGUSR1)
        _, errors = process.communicate(timeout=30)

    assert "ended with status 1: the neuron has ended with signal 9; what it said is" in errors


def test_a_machine_without_a_compiler_is_told_what_it_lacks(clone: Clone) -> None:
    _, output, _ = clone.run("--exit", FAKE_CORTEX="is-slow")

    assert "quickstart: CPU kernels are not available, plain torch serves" in output


def test_each_stack_writes_a_log_of_its_own(clone: Clone) -> None:
    clone.run("--exit")
    clone.run("--exit")

    assert len(list((clone.root / ".cache").glob("quickstart-*.log"))) == 2


def test_the_help_needs_no_installation(clone: Clone) -> None:
    status, output, _ = clone.run("--help")

    assert status == 0
    assert "--neuron-listen HOST:PORT" in output
    assert not (clone.root / ".venv").exists()
