"""Faults that tests let happen on purpose, spelled in NEURON_TEST_FAULTS.

    faults     fault[,fault...]
    fault      [device/]boundary:kind[@pass][xlives]

    boundary   kinds                                   a pass is                          in
    load       oom error hang abort segv lost          a model half read                  device
    forward    oom error hang nan abort segv lost      a step's forward                   device
    sample     oom error hang abort                    a step's sampling                  device
    event      garbage                                 an event sent                      device
    command    garbage                                 a command sent                     supervisor
    ring       full                                    a look into the ring               supervisor
    loop       busy                                    a look into the ring               supervisor
    download   broken hang                             a model's files fetched            supervisor

``cpu:0/forward:hang@3x2`` hangs in the third step of each of the first two lives of cpu:0. Without
a device it is every device's, without a pass the first, without lives the first one only. Each
fault strikes once in a life. Downloads have neither devices nor lives.

It is a switch for tests: no option, in no help, and without the variable none of it is even made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS: dict[str, frozenset[str]] = {
    "load": frozenset({"oom", "error", "hang", "abort", "segv", "lost"}),
    "forward": frozenset({"oom", "error", "hang", "nan", "abort", "segv", "lost"}),
    "sample": frozenset({"oom", "error", "hang", "abort"}),
    "event": frozenset({"garbage"}),
    "command": frozenset({"garbage"}),
    "ring": frozenset({"full"}),
    "loop": frozenset({"busy"}),
    "download": frozenset({"broken", "hang"}),
}

GARBAGE = b"\xc1 neither a command nor an event"
"""0xc1 begins nothing in MessagePack."""

_FAULT = re.compile(
    r"(?:(?P<device>(?:cpu|cuda):\d+)/)?(?P<boundary>[a-z]+):(?P<kind>[a-z]+?)"
    r"(?:@(?P<number>[1-9]\d*))?(?:x(?P<lives>[1-9]\d*))?"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; passes and lives count from 1."""

    boundary: str
    kind: str
    number: int = 1
    """The pass that it strikes."""
    lives: int = 1
    device: str | None = None

    def __str__(self) -> str:
        place = "" if self.device is None else f"{self.device}/"
        return f"{place}{self.boundary}:{self.kind}@{self.number}x{self.lives}"


def parse(text: str) -> list[Fault]:
    """Return the faults that *text* spells; raise ValueError for what is none."""
    return [_parse_one(word.strip()) for word in text.split(",")] if text.strip() else []


def of_life(faults: Sequence[Fault], device: str, life: int) -> list[Fault]:
    """Return those that concern the *life*-th life of *device*."""
    return [f for f in faults if f.device in {None, device} and life <= f.lives]


def spelled(faults: Sequence[Fault]) -> str:
    """Return what ``parse`` reads as *faults*."""
    return ",".join(map(str, faults))


class Passes:
    """Counts the passes of one boundary."""

    def __init__(self, faults: Sequence[Fault], boundary: str) -> None:
        self._due = {fault.number: fault.kind for fault in faults if fault.boundary == boundary}
        self._number = 0

    def __bool__(self) -> bool:
        """Whether a fault is still to come."""
        return any(number > self._number for number in self._due)

    def strikes(self) -> str | None:
        """Count a pass; return the kind of fault that strikes it."""
        self._number += 1
        return self._due.get(self._number)


def _parse_one(word: str) -> Fault:
    found = _FAULT.fullmatch(word)
    if found is None or found["kind"] not in KINDS.get(found["boundary"], ()):
        raise ValueError(f"{word!r} is no fault: [device/]boundary:kind[@pass][xlives]")
    return Fault(
        found["boundary"],
        found["kind"],
        int(found["number"] or 1),
        int(found["lives"] or 1),
        found["device"],
    )
