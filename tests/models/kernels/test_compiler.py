"""Where the compiled library lies, and what happens when it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cortex.models.kernels import compiler
from cortex.models.kernels.compiler import KernelsUnavailable, load_library

COMPILER = r"""#!/bin/sh
# A compiler that takes no time: it links an empty library.
case "$*" in *--version*) echo "fake 1.0"; exit;; esac
echo "$*" >> "$LOG"
while [ "$1" != -o ]; do shift; done
echo 'int nothing;' | {cc} -shared -fPIC -x c - -o "$2"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a quick compiler first in PATH and an empty cache in place; return what it was told."""
    cc = shutil.which("cc")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cc").write_text(COMPILER.replace("{cc}", str(cc)))
    (tools / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def in_a_child() -> subprocess.Popen[bytes]:
    program = "from cortex.models.kernels.compiler import load_library; load_library()"
    return subprocess.Popen([sys.executable, "-W", "error", "-c", program])


def libraries() -> list[Path]:
    return sorted(compiler.cache_directory().glob("*"))


def test_it_is_compiled_once(log: Path) -> None:
    load_library()
    load_library()

    assert len(log.read_text().splitlines()) == 1
    assert len(libraries()) == 1


def test_sums_are_compiled_as_they_are_written(log: Path) -> None:
    load_library()

    assert "-ffp-contract=off" in log.read_text()
    assert "-ffast-math" not in log.read_text()


@pytest.mark.parametrize("what", ["source", "flags", "compiler", "cpu"])
def test_another_input_is_another_library(
    log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    load_library()
    (tmp_path / "other.c").write_text("int other;")
    tool = tmp_path / "tools/cc"

    match what:
        case "source":
            monkeypatch.setattr(compiler, "SOURCE", tmp_path / "other.c")
        case "flags":
            monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-g"))
        case "compiler":
            tool.write_text(tool.read_text().replace("fake 1.0", "fake 2.0"))
        case _:
            monkeypatch.setattr(compiler, "_cpu_features", lambda: "another CPU")
    load_library()

    assert len(libraries()) == 2


def test_a_damaged_library_is_compiled_again(log: Path) -> None:
    load_library()
    (library,) = libraries()
    library.unlink()  # what is mapped must not be written to
    library.write_bytes(b"half a file")

    assert in_a_child().wait(60) == 0  # this process has it loaded already

    assert len(log.read_text().splitlines()) == 2


def test_a_cache_that_cannot_be_written_costs_a_compilation_only(log: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")

    load_library()
    load_library()

    assert len(log.read_text().splitlines()) == 2


def test_nowhere_to_write_is_said(
    log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("not a directory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))

    with pytest.raises(KernelsUnavailable, match="cannot be written or loaded"):
        load_library()


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(KernelsUnavailable, match="no C compiler is installed"):
        load_library()


def test_a_compiler_that_fails_is_quoted(log: Path, tmp_path: Path) -> None:
    (tmp_path / "tools/cc").write_text("#!/bin/sh\necho 'unknown option' >&2; exit 1\n")

    with pytest.raises(KernelsUnavailable, match="unknown option"):
        load_library()


def test_a_compiler_that_cannot_be_run_is_said(log: Path, tmp_path: Path) -> None:
    (tmp_path / "tools/cc").write_bytes(b"\x7fELF no program")

    with pytest.raises(KernelsUnavailable, match="failed"):
        load_library()


def test_a_relative_cache_directory_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")

    assert compiler.cache_directory() == Path.home() / ".cache/cortex/kernels"


def test_a_user_without_a_home_directory_compiles_for_each_process(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(missing))

    assert load_library().nothing is not None


def test_a_machine_without_proc_has_features_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "some CPU")

    assert compiler._cpu_features() == "some CPU"


def test_processes_that_start_together_all_get_a_whole_library(log: Path) -> None:
    program = "from cortex.models.kernels.compiler import load_library; load_library()"
    children = [subprocess.Popen([sys.executable, "-W", "error", "-c", program]) for _ in range(4)]

    codes = [child.wait(60) for child in children]

    assert codes == [0, 0, 0, 0]
    assert len(libraries()) == 1
