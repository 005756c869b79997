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


def shared_memory_bytes() -> int:
    """Return the size of all files in /dev/shm."""
    sizes = 0
    for path in Path("/dev/shm").iterdir():  # noqa: S108  # read only
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes
