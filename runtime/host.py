"""What this host lets us use: cores, memory, and who we are on it.

A container's limits count, not the machine's: the affinity mask and the CPU quota for cores, the
tightest memory limit on the way up the control groups (both versions) and RLIMIT_AS for memory.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""Its number is fixed in the kernel (PROC_PID_INIT_INO)."""
CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Host:
    """Cores we may run on, and bytes of memory we may still take."""

    cores: int
    memory_bytes: int

    @classmethod
    def read(cls, proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> Host:
        """Look at the host as it is now."""
        cores = len(os.sched_getaffinity(0))
        quota = min(_core_quotas(proc, control_groups), default=float(cores))
        return cls(
            cores=max(1, min(cores, int(quota))),
            memory_bytes=min(_memory_bounds(proc, control_groups)),
        )


def resident_bytes(pid: int, proc: Path = PROC) -> int | None:
    """Return the memory that the process holds, shared pages included; None if it is gone."""
    try:
        pages = int((proc / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def counts_all_processes(proc: Path = PROC) -> bool:
    """Whether our process numbers are those that a driver names, as in no container."""
    try:
        return str((proc / "self" / "ns" / "pid").readlink()) == FIRST_PID_NAMESPACE
    except OSError:
        return False


def _memory_bounds(proc: Path, control_groups: Path) -> Iterator[int]:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft
    for group in _groups(proc, control_groups, "memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            bound, used = _number(group / limit), _number(group / usage)
            if bound is not None:
                yield max(0, bound - (used or 0))


def _core_quotas(proc: Path, control_groups: Path) -> Iterator[float]:
    for group in _groups(proc, control_groups, "cpu"):
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            yield quota / period


def _groups(proc: Path, control_groups: Path, controller: str) -> Iterator[Path]:
    """Yield our control groups that may bound *controller*, from the innermost to the root."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = control_groups / controller if controllers else control_groups
        group = root / path.lstrip("/")
        while True:
            yield group
            if group == root:
                break
            group = group.parent


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    """Return the file's text, empty where the kernel does not have the file."""
    try:
        return path.read_text()
    except OSError:
        return ""
