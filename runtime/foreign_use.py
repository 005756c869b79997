"""What others hold of a device's memory, which no budget of ours knows about. Pure.

On a GPU these are the processes that the driver names and that are not ours. In a container the
driver's numbers mean nothing to us, so there nobody can say. On CPU devices it is what the host has
less than it would have with nobody but us: the budgets of all of them, minus what is available and
what their processes hold already.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cortex.runtime.discovery import Holder

MIB = 2**20
NOTABLE_BYTES = 64 * MIB
"""A desktop's windows take less."""
MUCH_BYTES = 1024 * MIB


@dataclass(frozen=True, slots=True)
class ForeignUse:
    """Memory that others hold, and who, where that is known."""

    held_bytes: int = 0
    holders: tuple[Holder, ...] = ()

    @property
    def held_mb(self) -> int:
        """In megabytes."""
        return self.held_bytes // MIB

    @property
    def is_notable(self) -> bool:
        """Whether an operator should know of it."""
        return self.held_bytes >= NOTABLE_BYTES

    @property
    def words(self) -> str:
        """What a refusal for want of memory adds; empty where it does not matter."""
        if not self.is_notable:
            return ""
        if not self.holders:
            return f"; other processes of this host have taken {self.held_mb} MB of its budget"
        by_whom = ", ".join(f"pid {h.pid} ({h.held_bytes // MIB} MB)" for h in self.holders)
        return f"; {self.held_mb} MB of it are held by other processes: {by_whom}"

    def differs_from(self, other: ForeignUse) -> bool:
        """Whether so much has changed since *other* that it should be said."""
        if self.is_notable != other.is_notable:
            return True
        if not self.is_notable:
            return False
        is_by_others = {h.pid for h in self.holders} != {h.pid for h in other.holders}
        return is_by_others or abs(self.held_bytes - other.held_bytes) >= MUCH_BYTES


def of_gpu(holders: Sequence[Holder], ours: Collection[int | None]) -> ForeignUse:
    """Return what the *holders* of a GPU's memory hold, but for *ours*, by process number."""
    others = tuple(holder for holder in holders if holder.pid not in ours)
    return ForeignUse(sum(holder.held_bytes for holder in others), others)


def of_cpus(budget_bytes: int, available_bytes: int, held_bytes: int) -> ForeignUse:
    """Return what is missing of the budgets of all CPU devices, of which they hold *held_bytes*."""
    return ForeignUse(max(0, budget_bytes - available_bytes - held_bytes))
