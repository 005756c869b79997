"""Who owns which slot of the recurrent states, and which slots hold a snapshot of a known head.

A slot is one of these:

    state       what it holds                         taken, by a sequence or for a snapshot
    free        nothing of use                        first
    snapshot    the state after the blocks of a key   when none is free; least recently used first
    taken       the state of a sequence that runs     never

A snapshot is known by the key of the chain of blocks after which it was taken
(``block_pool.block_key``), and is only copied from: the sequence that continues from it does so in
a slot of its own. Seats that are empty hold snapshots, so no memory lies idle. Numbers only: no
memory and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable


class StatePool:
    """Slots ``0 .. total-1``, each for the state of one sequence in all layers."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(reversed(range(total)))
        self._slot_of: dict[bytes, int] = {}  # of snapshots; the least recently used first

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    @property
    def free(self) -> int:
        """How many slots can be taken: free ones and snapshots."""
        return len(self._free) + len(self._slot_of)

    @property
    def snapshots(self) -> int:
        """How many slots the next prompt may find."""
        return len(self._slot_of)

    def take(self) -> int | None:
        """Return a slot, the caller's from now on; None where all are taken."""
        if self._free:
            return self._free.pop()
        if not self._slot_of:
            return None
        return self._slot_of.pop(next(iter(self._slot_of)))

    def give_back(self, slot: int) -> None:
        """Own *slot* no more."""
        self._free.append(slot)

    def keep(self, slot: int, key: bytes) -> None:
        """Make a taken *slot* the snapshot known by *key*; of two with one key the first stays."""
        if key in self._slot_of:
            self._free.append(slot)
        else:
            self._slot_of[key] = slot

    def use(self, key: bytes) -> int | None:
        """Return the slot of the snapshot known by *key*, now the last to be reused; or None."""
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            self._slot_of[key] = slot
        return slot

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let no further prompt find the snapshots that are known by *keys*."""
        for key in keys:
            slot = self._slot_of.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    def clear(self) -> None:
        """Forget all snapshots."""
        self.forget(list(self._slot_of))
