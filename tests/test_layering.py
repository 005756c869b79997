"""Imports point one way, and torch stays where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gateway", "runtime", "ipc", "models")

# For every part of the house, the parts it may import besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "ipc": set(),
    "models": {"models.checkpoints"},
    "models.checkpoints": set(),
    "gateway": {"ipc"},
    "runtime": {"ipc", "models.checkpoints"},
    "runtime.device": {"ipc", "models", "models.checkpoints"},
}
LAZY = {"runtime/fork_server.py": {"runtime.device"}}  # the target of the fork

# Parts that must start without these; a gateway host has none of the neuron's dependencies.
NEURON_ONLY = {
    "jinja2",
    "llguidance",
    "numpy",
    "pynvml",
    "zmq",
    "safetensors",
    "setproctitle",
    "tokenizers",
}
FORBIDDEN = {
    "gateway": {"torch", *NEURON_ONLY},
    "ipc": {"torch"},
    "models.checkpoints": {"torch", "numpy"},
    "runtime": {"torch", "triton"},
}
IN_DEVICE_PROCESSES_ONLY = {"cortex.runtime.preload"}


def part_of(module: str) -> str:
    """Return the longest part of the house that contains *module*."""
    name = module.removeprefix("cortex.")
    return max((p for p in MAY_IMPORT if f"{name}.".startswith(f"{p}.")), key=len)


def our_imports(source: str) -> set[str]:
    """Return the parts of the house imported anywhere in *source*."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {part_of(name) for name in names if name.startswith("cortex.")}


def source_files() -> list[str]:
    """Every source file, relative to the repository."""
    return [str(p.relative_to(ROOT)) for d in PACKAGES for p in sorted((ROOT / d).rglob("*.py"))]


def module_of(file: str) -> str:
    """``gateway/__init__.py`` -> ``cortex.gateway``."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"cortex.{name}"


def strangers(file: str, source: str) -> set[str]:
    """Return the parts that *source*, standing in *file*, imports and may not."""
    part = part_of(module_of(file))
    return our_imports(source) - MAY_IMPORT[part] - {part} - LAZY.get(file, set())


def modules_of(part: str) -> list[str]:
    """Every module of *part* that the supervisor or the gateway may import."""
    modules = [module_of(file) for file in source_files()]
    return [m for m in modules if part_of(m) == part and m not in IN_DEVICE_PROCESSES_ONLY]


@pytest.mark.parametrize("file", source_files())
def test_a_file_imports_only_its_allowed_neighbours(file: str) -> None:
    assert strangers(file, (ROOT / file).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("gateway/routes.py", "from cortex.runtime import config"),
        ("gateway/routes.py", "def lazily():\n    import cortex.models.llama"),
        ("runtime/app.py", "from cortex.models import llama"),
        ("runtime/app.py", "from cortex.runtime.device.main import main"),
        ("models/llama.py", "from cortex.ipc.errors import CortexError"),
        ("models/checkpoints/gguf.py", "from cortex.models.llama import Model"),
        ("ipc/codec.py", "from cortex import gateway"),
    ],
)
def test_an_import_across_a_wall_is_found(file: str, source: str) -> None:
    assert strangers(file, source) != set()


def test_only_the_fork_server_names_the_device_process() -> None:
    supervisor = [file for file in source_files() if part_of(module_of(file)) == "runtime"]

    naming = {f for f in supervisor if "runtime.device" in our_imports((ROOT / f).read_text())}

    assert naming <= set(LAZY)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_of_the_house_starts_without_what_it_must_not_need(part: str) -> None:
    program = f"""
import importlib, sys
for module in {modules_of(part)}:
    importlib.import_module(module)
    found = sorted({FORBIDDEN[part]} & set(sys.modules))
    if found:
        sys.exit(f"importing {{module}} imports {{found}}")
"""

    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert (ended.stderr, ended.returncode) == ("", 0)


def test_every_package_directory_is_listed_in_pyproject() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    found = {
        ".".join(("cortex", *init.parent.relative_to(ROOT).parts))
        for package in PACKAGES
        for init in (ROOT / package).rglob("__init__.py")
    }

    assert found == set(tool["setuptools"]["packages"])


def test_every_directory_of_modules_is_a_package() -> None:
    directories = {(ROOT / file).parent for file in source_files()}

    assert [str(d) for d in directories if not (d / "__init__.py").exists()] == []


@pytest.mark.parametrize("file", [f for f in source_files() if f.endswith("__init__.py")])
def test_a_package_file_holds_a_docstring_and_nothing_else(file: str) -> None:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body

    assert [type(node) for node in body] == [ast.Expr]


def test_the_packaging_directory_does_not_shadow_the_packaging_library() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_static_tools_find_every_package_under_its_import_name(package: str) -> None:
    link = ROOT / "packaging" / "importroot" / "cortex" / package

    assert link.is_symlink()
    assert link.resolve() == ROOT / package
