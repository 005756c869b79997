"""Every script can be run, from anywhere, and says how it went. The large ones: tests/scripts/."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(p for p in (ROOT / "scripts").iterdir() if p.is_file()), ROOT / ".ci" / "run"]
BASH = [path for path in SCRIPTS if path.read_bytes().startswith(b"#!/usr/bin/env bash\n")]
RECORDER = """#!/bin/bash
echo "${0##*/} $*" >> "$JOURNAL"
[[ "${0##*/} $*" != *"$FAILS_AT"* ]]
"""


def named(path: Path) -> str:
    """Return a path as the test list shows it."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", [p for p in SCRIPTS if p.suffix != ".py"], ids=named)
def test_a_script_is_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", BASH, ids=named)
def test_a_bash_script_stops_at_the_first_failure(script: Path) -> None:
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", BASH, ids=named)
def test_a_bash_script_says_on_top_what_it_is_for(script: Path) -> None:
    first = [line for line in script.read_text(encoding="utf-8").splitlines()[1:3] if line != "#"]

    assert first[0].startswith("# ")


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: the scripts were not checked with it")

    ended = subprocess.run(["shellcheck", *BASH], capture_output=True, text=True, check=False)

    assert (ended.stdout, ended.returncode) == ("", 0)


class Clone:
    """The short scripts, with an environment whose programs only write down that they ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._journal = root / "journal"
        for name in ("scripts/check", "scripts/fmt", "scripts/test", ".ci/run"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        programs = ("python", "ruff", "mypy")
        for path in (root / "scripts/install", *(root / ".venv/bin" / p for p in programs)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(RECORDER)
            path.chmod(0o755)

    def run(self, script: str, *arguments: str, fails_at: str = "\n") -> int:
        """Run *script* from another directory; return its status."""
        env = os.environ | {"JOURNAL": str(self._journal), "FAILS_AT": fails_at}
        env.pop("CORTEX_VENV", None)
        command = [str(self.root / script), *arguments]
        ended = subprocess.run(command, cwd="/", env=env, capture_output=True, check=False)
        return ended.returncode

    @property
    def has_run(self) -> bool:
        """Whether any program ran."""
        return self._journal.exists()

    @property
    def ran(self) -> list[str]:
        """What ran, in order."""
        return self._journal.read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone whose environment stands."""
    return Clone(tmp_path)


def test_the_tests_install_what_they_need_and_take_pytest_s_arguments(clone: Clone) -> None:
    status = clone.run("scripts/test", "-k", "ring or tap", "-x")

    install, pytest_run = clone.ran
    assert (status, install) == (0, "install --dev")
    assert pytest_run.startswith("python -P -m pytest")
    assert pytest_run.endswith("-k ring or tap -x")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_asked_for_help_the_tests_say_what_they_take_and_install_nothing(
    clone: Clone, option: str
) -> None:
    script = clone.root / "scripts/test"

    ended = subprocess.run([script, option], cwd="/", capture_output=True, text=True, check=False)

    assert (ended.returncode, clone.has_run) == (0, False)
    assert ended.stdout.startswith("Run the tests")
    assert "scripts/test tests/ipc" in ended.stdout


def test_the_check_runs_what_fails_fastest_first(clone: Clone) -> None:
    assert clone.run("scripts/check") == 0
    assert clone.ran == ["install --dev", "ruff format --check .", "ruff check .", "mypy "]


def test_the_formatter_fixes_and_then_formats(clone: Clone) -> None:
    assert clone.run("scripts/fmt") == 0
    assert clone.ran == ["install --dev", "ruff check --fix .", "ruff format ."]


def test_the_gate_checks_and_tests(clone: Clone) -> None:
    assert clone.run(".ci/run") == 0
    assert any(line.startswith("mypy") for line in clone.ran)
    assert "pytest" in clone.ran[-1]


@pytest.mark.parametrize("step", ["install --dev", "ruff format", "ruff check", "mypy", "pytest"])
def test_the_gate_fails_where_a_step_fails(clone: Clone, step: str) -> None:
    assert clone.run(".ci/run", fails_at=step) != 0
    assert step in clone.ran[-1]
