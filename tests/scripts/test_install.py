"""``scripts/install``, with real environments and a pip that writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = "WARNING: Retrying after connection broken by 'NewConnectionError(...)': /simple/torch/"

# A Python whose `-m venv` makes real environments, with the pip below instead of the real one.
PYTHON = """#!/bin/bash
if [[ "$1 $2" != "-m venv" ]]; then exec {python} "$@"; fi
venv=${{!#}}
{python} -m venv --without-pip "${{@:3}}"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$site/pip"
touch "$site/pip/__init__.py"
cp {pip} "$site/pip/__main__.py"
printf '#!%s/bin/python\\n' "$venv" > "$venv/bin/pip"
"""
PIP = """
import os, sys
asked = " ".join(sys.argv[1:])
open(os.environ["PIP_JOURNAL"], "a").write(asked + "\\n")
if os.environ.get("PIP_FAILS_AT", "\\0") in asked:
    print(os.environ["PIP_SAYS"])
    sys.exit(1)
"""
OLD_PYTHON = """#!/bin/bash
case $2 in *print*) echo 3.9.2 ;; *) exit 1 ;; esac
"""
BARE_PYTHON = """#!/bin/bash
if [[ $2 == *ensurepip* ]]; then exit 1; fi
exec {python} "$@"
"""


class Checkout:
    """A bare clone, as far as scripts/install sees it."""

    def __init__(self, root: Path, tools: Path) -> None:
        self.root = root
        self._tools = tools
        self._journal = tools / "journal"
        for file in ("scripts/install", "pyproject.toml", "packaging/constraints.txt"):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, root / file)
        (tools / "pip.py").write_text(PIP)
        self.python = self.tool(
            "python", PYTHON.format(python=sys.executable, pip=tools / "pip.py")
        )

    @property
    def venv(self) -> Path:
        """Where the environment comes unless told otherwise."""
        return self.root / ".venv"

    @property
    def log(self) -> Path:
        """What the user is pointed to."""
        return self.root / ".cache" / "install.log"

    @property
    def asked_of_pip(self) -> list[str]:
        """Every pip command so far, without the options that all have."""
        if not self._journal.exists():
            return []
        return [
            line.replace("--disable-pip-version-check --no-input ", "")
            for line in self._journal.read_text().splitlines()
        ]

    def tool(self, name: str, text: str) -> Path:
        """Put a program on the PATH, before the real one."""
        path = self._tools / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def change(self, file: str) -> None:
        """Edit a file of the checkout."""
        with (self.root / file).open("a") as changed:
            changed.write("# changed\n")

    def install(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/install."""
        return subprocess.run(
            [self.root / "scripts" / "install", *arguments],
            env={
                "PATH": f"{self._tools}:{os.environ['PATH']}",
                "PYTHON": str(self.python),
                "PIP_JOURNAL": str(self._journal),
                **env,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh clone in an empty folder, and a disk with room."""
    tools = tmp_path / "tools"
    tools.mkdir()
    fresh = Checkout(tmp_path / "a clone", tools)
    fresh.tool("df", "#!/bin/bash\necho Header\necho / 1 1 99000000 1% /\n")
    return fresh


def the_sentence(ended: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that says why it failed."""
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    return line


def test_torch_comes_before_what_depends_on_it(checkout: Checkout) -> None:
    ended = checkout.install()

    first, *_, last = checkout.asked_of_pip
    assert ended.returncode == 0
    assert first.startswith("install torch")
    assert last == "install -e .[neuron] -c packaging/constraints.txt"


def test_every_version_is_the_tested_one(checkout: Checkout) -> None:
    checkout.install()

    assert all("-c packaging/constraints.txt" in asked for asked in checkout.asked_of_pip)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="has a GPU: takes torch for CUDA")
def test_a_host_without_a_gpu_takes_torch_without_cuda(checkout: Checkout) -> None:
    checkout.install()

    assert checkout.asked_of_pip[0].startswith("install torch==2.13.0+cpu ")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="has a GPU: takes torch for CUDA")
def test_where_the_index_has_no_cpu_build_pytorch_s_own_index_is_asked_and_then_any_build_taken(
    checkout: Checkout,
) -> None:
    ended = checkout.install(PIP_FAILS_AT="+cpu", PIP_SAYS="ERROR: No matching distribution found")

    configured, pytorch, any_build, _ = checkout.asked_of_pip
    assert ended.returncode == 0
    assert "--extra-index-url" not in configured
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in pytorch
    assert any_build == "install torch -c packaging/constraints.txt"


def test_a_second_run_does_nothing(checkout: Checkout) -> None:
    checkout.install()
    before = checkout.asked_of_pip

    ended = checkout.install()

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert checkout.asked_of_pip == before


@pytest.mark.parametrize("file", ["pyproject.toml", "packaging/constraints.txt"])
def test_another_list_of_dependencies_is_installed(checkout: Checkout, file: str) -> None:
    checkout.install()
    before = checkout.asked_of_pip
    checkout.change(file)

    checkout.install()

    assert checkout.asked_of_pip == before * 2


def test_an_installation_that_failed_is_tried_again(checkout: Checkout) -> None:
    checkout.install(PIP_FAILS_AT="-e .", PIP_SAYS="ERROR: no luck")

    ended = checkout.install()

    assert ended.returncode == 0
    assert "done in" in ended.stdout


def test_what_the_tests_need_comes_with_dev_only(checkout: Checkout) -> None:
    checkout.install()

    checkout.install("--dev")

    assert checkout.asked_of_pip[-1] == "install -e .[dev] -c packaging/constraints.txt"


def test_dev_holds_everything_a_user_needs(checkout: Checkout) -> None:
    checkout.install("--dev")
    before = checkout.asked_of_pip

    checkout.install()

    assert checkout.asked_of_pip == before


def test_each_phase_is_one_line(checkout: Checkout) -> None:
    ended = checkout.install()

    *phases, last = ended.stdout.splitlines()
    assert len(phases) == 4
    assert last.startswith("install: done in ")


def test_an_environment_elsewhere_is_used_where_it_is_named(
    checkout: Checkout, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"

    checkout.install(CORTEX_VENV=str(elsewhere))

    assert (elsewhere / "bin" / "python").exists()
    assert not checkout.venv.exists()


def break_python(checkout: Checkout) -> None:
    """As an upgrade of the system's Python does."""
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/nonexistent/python3.11")


def break_pip(checkout: Checkout) -> None:
    """As an interrupted creation does."""
    (checkout.venv / "bin" / "pip").unlink()


def move(checkout: Checkout) -> None:
    """Scripts in an environment name their Python by its path."""
    checkout.root = checkout.root.rename(checkout.root.with_name("another clone"))


@pytest.mark.parametrize("harm", [break_python, break_pip, move])
def test_an_environment_that_cannot_work_is_made_anew(
    checkout: Checkout, harm: Callable[[Checkout], None]
) -> None:
    checkout.install()
    harm(checkout)
    checkout.change("pyproject.toml")

    ended = checkout.install()

    assert ended.returncode == 0, ended.stderr
    assert "making the virtual environment" in ended.stdout
    assert str(checkout.venv) in (checkout.venv / "bin" / "pip").read_text()


def test_a_sound_environment_is_kept(checkout: Checkout) -> None:
    checkout.install()
    checkout.change("pyproject.toml")

    ended = checkout.install()

    assert "making the virtual environment" not in ended.stdout


def test_a_directory_that_is_no_environment_is_left_alone(
    checkout: Checkout, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").touch()

    ended = checkout.install(CORTEX_VENV=str(home))

    assert "exists and is not a virtual environment" in the_sentence(ended)
    assert [path.name for path in home.iterdir()] == ["thesis.tex"]


def test_a_wrong_python_is_named_with_its_version(checkout: Checkout) -> None:
    old = checkout.tool("python3.9", OLD_PYTHON)

    sentence = the_sentence(checkout.install(PYTHON=str(old)))

    assert f"cortex needs Python 3.11, 3.12 or 3.13; found {old} (3.9.2)." in sentence


def test_another_python_is_taken_where_the_first_is_too_old(checkout: Checkout) -> None:
    checkout.tool("python3", OLD_PYTHON)
    right = checkout.tool("python3.13", checkout.python.read_text())

    ended = checkout.install("--python", PYTHON="")

    assert (ended.returncode, ended.stdout.strip()) == (0, str(right))


def test_a_python_that_is_not_there_is_said(checkout: Checkout) -> None:
    ended = checkout.install(PYTHON="/nonexistent/python3")

    assert "/nonexistent/python3, which does not exist" in the_sentence(ended)


def test_a_python_without_venv_is_said_with_its_cure(checkout: Checkout) -> None:
    bare = checkout.tool("python3.12", BARE_PYTHON.format(python=sys.executable))

    sentence = the_sentence(checkout.install(PYTHON=str(bare)))

    assert "lacks the venv module" in sentence
    assert "apt install python3-venv" in sentence


def test_no_network_is_one_sentence_after_one_attempt(checkout: Checkout) -> None:
    ended = checkout.install(PIP_FAILS_AT="torch", PIP_SAYS=OFFLINE)

    assert f"no network: the Python package index cannot be reached; log: {checkout.log}" in (
        the_sentence(ended)
    )
    assert len(checkout.asked_of_pip) == 1


def test_too_small_a_disk_is_said_before_anything_is_fetched(checkout: Checkout) -> None:
    checkout.tool("df", "#!/bin/bash\necho Header\necho / 1 1 1024000 99% /\n")

    sentence = the_sentence(checkout.install())

    assert "disk full:" in sentence
    assert "has 1000 MB free" in sentence
    assert checkout.asked_of_pip == []


def test_a_disk_that_fills_up_is_said(checkout: Checkout) -> None:
    ended = checkout.install(PIP_FAILS_AT="-e .", PIP_SAYS="OSError: No space left on device")

    assert "disk full: no space left while installing" in the_sentence(ended)


def test_any_other_failure_is_pip_s_last_error_and_the_log(checkout: Checkout) -> None:
    said = "Collecting cortex\nERROR: Failed building wheel for cortex-serve\nnoise"

    sentence = the_sentence(checkout.install(PIP_FAILS_AT="-e .", PIP_SAYS=said))

    assert "cortex cannot be installed: ERROR: Failed building wheel for cortex-serve;" in sentence
    assert str(checkout.log) in sentence
    assert "noise" in checkout.log.read_text()


def test_a_checkout_that_cannot_be_written_is_said(checkout: Checkout) -> None:
    (checkout.root / ".cache").touch()  # a file where the directory of the log should be

    assert "cannot write" in the_sentence(checkout.install())


def test_an_option_that_does_not_exist_is_refused(checkout: Checkout) -> None:
    assert "unknown option --fast" in the_sentence(checkout.install("--fast"))


def test_the_help_names_what_can_be_set(checkout: Checkout) -> None:
    ended = checkout.install("--help")

    assert ended.returncode == 0
    for word in ("--dev", "CORTEX_VENV", "PYTHON"):
        assert word in ended.stdout
