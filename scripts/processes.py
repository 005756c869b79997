"""What /proc tells of the processes of a stack: who is who, and what each of them holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holdings:
    """What a process holds."""

    anonymous_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        """Look at *pid*; raise ProcessLookupError or FileNotFoundError where it has gone."""
        status = status_of(pid)
        return cls(
            anonymous_bytes=int(status["RssAnon"].split()[0]) * 1024,
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208  # a number is all
            threads=int(status["Threads"]),
        )


def status_of(pid: int) -> dict[str, str]:
    """Return /proc/PID/status, by name."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return {
        name: value.strip()
        for name, _, value in (line.partition(":") for line in text.splitlines())
    }


def family(pid: int) -> Iterator[int]:
    """Yield *pid* and its descendants, zombies too."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [(task / "children").read_text(encoding="ascii") for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in " ".join(children).split():
        yield from family(int(child))


def is_zombie(pid: int) -> bool:
    """Whether *pid* has ended and nobody has asked how."""
    try:
        return status_of(pid)["State"].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_alive(pid: int) -> bool:
    """Whether *pid* runs."""
    return Path(f"/proc/{pid}").exists() and not is_zombie(pid)


def name_of(pid: int) -> str:
    """Return what a process is, from its command line; empty where it has gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    title = words[0].strip()
    if title.startswith("neuron"):
        return title
    if "resource_tracker" in " ".join(words):
        return "multiprocessing's resource tracker"
    return "neuron supervisor" if "cortex.runtime" in " ".join(words) else "gateway"


def named(pid: int) -> dict[str, int]:
    """Return the processes of the family of *pid* by name."""
    return {name_of(member): member for member in family(pid) if is_alive(member)}


def cpu_seconds(pid: int) -> float:
    """Return how long the processors have worked for *pid*, in the kernel too."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scheduled_seconds(pid: int) -> float:
    """Return the same of the threads that *pid* has now: exact where they sleep, not in ticks."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    told = [(task / "schedstat").read_text(encoding="ascii") for task in tasks]
    return sum(int(text.split()[0]) for text in told) / 1e9


def busy_seconds() -> float:
    """Return how long all processors have worked since the start, for anybody."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    user, nice, system, _idle, _waiting, *interrupted = map(int, first[1:9])
    return (user + nice + system + sum(interrupted)) / os.sysconf("SC_CLK_TCK")


def cpu_seconds_by_name(pid: int) -> dict[str, float]:
    """Return ``cpu_seconds`` of the family of *pid*."""
    return {name: cpu_seconds(member) for name, member in named(pid).items()}


def proportional_bytes(pid: int | str) -> int:
    """Return the memory of *pid*, which may be "self", shared pages counted in part (PSS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return int(text.split("\nPss:")[1].split()[0]) * 1024


def shared_memory_bytes() -> int:
    """Return the size of all files in /dev/shm."""
    sizes = 0
    for path in Path("/dev/shm").iterdir():  # noqa: S108  # read only
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes
