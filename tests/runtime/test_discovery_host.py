"""Cores and memory that this host lets us use, also inside a container."""

import os
import resource
from pathlib import Path

import pytest

from cortex.runtime.host import Host, resident_bytes

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host without limits and 16 GiB available, in files."""
    put(tmp_path / "proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    put(tmp_path / "proc/self/cgroup", "0::/system.slice/neuron.service\n")
    return tmp_path


def put(path: Path, text: str) -> None:
    """Write *text*, making directories as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(root: Path) -> Host:
    """Look at the host in *root*."""
    return Host.read(root / "proc", root / "cgroup")


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def test_without_limits_it_is_what_is_available(root: Path) -> None:
    assert read(root) == Host(cores=8, memory_bytes=16 * GIB)


def test_a_limit_of_our_own_group_counts_less_what_is_used(root: Path) -> None:
    group = root / "cgroup/system.slice/neuron.service"
    put(group / "memory.max", f"{4 * GIB}\n")
    put(group / "memory.current", f"{1 * GIB}\n")
    put(group / "cpu.max", "150000 100000\n")

    assert read(root) == Host(cores=1, memory_bytes=3 * GIB)


def test_a_limit_further_up_counts_too(root: Path) -> None:
    put(root / "cgroup/system.slice/memory.max", f"{2 * GIB}\n")
    put(root / "cgroup/system.slice/neuron.service/memory.max", "max\n")
    put(root / "cgroup/cpu.max", "max 100000\n")

    assert read(root) == Host(cores=8, memory_bytes=2 * GIB)


def test_the_old_control_groups_are_read_as_well(root: Path) -> None:
    put(root / "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n")
    put(root / "cgroup/memory/box/memory.limit_in_bytes", f"{GIB}\n")
    put(root / "cgroup/memory/box/memory.usage_in_bytes", "0\n")
    put(root / "cgroup/cpu/box/cpu.cfs_quota_us", "400000\n")
    put(root / "cgroup/cpu/box/cpu.cfs_period_us", "100000\n")

    assert read(root) == Host(cores=4, memory_bytes=GIB)


def test_an_unlimited_quota_of_the_old_kind_is_no_limit(root: Path) -> None:
    put(root / "proc/self/cgroup", "3:cpu:/\n")
    put(root / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    put(root / "cgroup/cpu/cpu.cfs_period_us", "100000\n")

    assert read(root).cores == 8


def test_an_address_space_limit_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (5 * GIB, 5 * GIB))

    assert read(root).memory_bytes == 5 * GIB


def test_this_very_host_can_be_read() -> None:
    host = Host.read()

    assert host.cores >= 1
    assert host.memory_bytes > 0


def test_a_process_holds_memory_and_one_that_is_gone_holds_none(tmp_path: Path) -> None:
    assert (resident_bytes(os.getpid()) or 0) > 2**20
    assert resident_bytes(1, tmp_path) is None
