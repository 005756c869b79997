"""What an operator installs: dependencies, units, licence, and files that name no one's machine."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts]
    for name, texts in PROJECT["optional-dependencies"].items()
}
TESTED = [
    line
    for line in (PACKAGING / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PINS = dict(line.split("==") for line in TESTED)
# flash-attn: only sources on PyPI, which need nvcc. triton: torch for CUDA asks for one version of
# it, which a pin made beside torch for a CPU would contradict.
UNTESTED = {"flash-attn", "triton"}

EXPOSURE = {"cortex": 1.5, "neuron": 2.0}
"""What ``systemd-analyze security`` may find, of 10; raise it only with a reason in the unit."""


def canonical(name: str) -> str:
    """Return a distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> list[Requirement]:
    """Everything pyproject.toml asks for that is not ourselves."""
    everything = [*BASE, *(requirement for extra in EXTRAS.values() for requirement in extra)]
    return [r for r in everything if r.name != PROJECT["name"] and r.name not in UNTESTED]


def test_a_gateway_host_installs_nothing_of_the_neuron() -> None:
    neuron = {requirement.name for requirement in EXTRAS["neuron"]}

    assert neuron >= {"torch", "pyzmq", "tokenizers", "numpy", "safetensors", "jinja2"}
    assert not neuron & {requirement.name for requirement in BASE}


def test_nothing_that_a_gateway_host_installs_brings_torch() -> None:
    waiting, seen = [requirement.name for requirement in BASE], set()
    while waiting:
        name = canonical(waiting.pop())
        if name not in seen and name in PINS:
            seen.add(name)
            needs = [Requirement(text) for text in metadata.requires(name) or []]
            waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate()]

    assert len(seen) > len(BASE)
    assert not seen & {"torch", "numpy", "pyzmq", "tokenizers", "safetensors", "transformers"}


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_the_tested_set_holds_every_dependency_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonical(requirement.name)])


@pytest.mark.parametrize("line", TESTED)
def test_the_tested_set_pins_exactly(line: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)  # no "+cpu": other hosts lack it


def test_the_tested_torch_is_the_one_the_engine_was_measured_with() -> None:
    assert PINS["torch"] == "2.13.0"


def test_the_licence_is_the_gpl_version_3() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")

    assert PROJECT["license"] == "GPL-3.0-only"
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007" in text


def test_the_changelog_has_the_version_that_is_installed() -> None:
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_names_the_machine_it_was_written_on() -> None:
    folders = ("gateway", "runtime", "ipc", "models", "tests", "scripts", "packaging", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"}]
    private = re.compile(rb"/(?:work|root|Users|home/[a-z]+)/")

    naming = [
        str(path.relative_to(ROOT))
        for path in files
        if "__pycache__" not in path.parts and private.search(path.read_bytes())
    ]

    assert naming == []


def unit(name: str) -> configparser.RawConfigParser:
    """Return a unit file; of a key that is given twice, the last value."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign] # the documented way
    parser.read_string((PACKAGING / f"{name}.service").read_text(encoding="utf-8"))
    return parser


def startable(name: str, directory: Path) -> Path:
    """Return a copy of a unit whose program exists on this machine."""
    text = (PACKAGING / f"{name}.service").read_text(encoding="utf-8")
    copy = directory / f"{name}.service"
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text), encoding="utf-8")
    return copy


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; skip where there is none."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the units were not checked")
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", EXPOSURE)
def test_systemd_has_nothing_to_say_against_a_unit(name: str, tmp_path: Path) -> None:
    ended = analyze("verify", "--man=no", str(startable(name, tmp_path)))

    assert (ended.stdout + ended.stderr, ended.returncode) == ("", 0)


@pytest.mark.parametrize("name", EXPOSURE)
def test_a_unit_is_hardened_as_far_as_its_work_allows(name: str, tmp_path: Path) -> None:
    threshold = f"--threshold={EXPOSURE[name] * 10:.0f}"

    ended = analyze("security", "--offline=true", threshold, str(startable(name, tmp_path)))

    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", EXPOSURE)
def test_a_unit_starts_the_installed_command_with_its_configuration(name: str) -> None:
    command = unit(name)["Service"]["ExecStart"]

    assert command == f"/usr/bin/{name} serve --config /etc/{name}/{name}.toml"
    assert name in PROJECT["scripts"]


@pytest.mark.parametrize("name", EXPOSURE)
def test_a_unit_waits_for_readiness_and_watches_the_daemon(name: str) -> None:
    service = unit(name)["Service"]

    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert int(service["WatchdogSec"]) > 0


@pytest.mark.parametrize("name", EXPOSURE)
def test_a_unit_restarts_after_a_failure_only(name: str) -> None:
    service = unit(name)["Service"]

    assert (service["Restart"], service["RestartSec"]) == ("on-failure", "5")


@pytest.mark.parametrize("name", EXPOSURE)
def test_a_unit_stops_after_the_drain_is_over(name: str) -> None:
    service = unit(name)["Service"]

    assert int(service["TimeoutStopSec"].removesuffix("s")) > 60
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")


def test_a_neuron_that_cannot_stay_up_is_not_restarted_for_ever() -> None:
    section = unit("neuron")["Unit"]

    assert (section["StartLimitIntervalSec"], section["StartLimitBurst"]) == ("600", "4")


def test_a_device_process_that_the_kernel_killed_does_not_stop_the_neuron() -> None:
    assert unit("neuron")["Service"]["OOMPolicy"] == "continue"


def test_the_neuron_may_open_nvidia_devices_and_no_others() -> None:
    service = unit("neuron")["Service"]

    assert (service["DevicePolicy"], service["DeviceAllow"]) == ("closed", "char-nvidia* rw")
    assert "PrivateDevices" not in service


@pytest.mark.parametrize("name", EXPOSURE)
def test_the_user_of_a_unit_can_be_made(name: str) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("systemd-sysusers is not installed: the users were not checked")
    users = PACKAGING / f"{name}.sysusers.conf"

    ended = subprocess.run(
        ["systemd-sysusers", "--dry-run", users], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
    assert unit(name)["Service"]["User"] == name
    assert f"u {name} " in users.read_text(encoding="utf-8")
