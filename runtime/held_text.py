"""How much of a text must wait, because what follows could make a marker of its end."""

from __future__ import annotations

from collections.abc import Collection


def could_begin(text: str, markers: Collection[str]) -> int:
    """Return the length of the longest end of *text* that is a beginning, not all, of a marker.

    No marker is empty.
    """
    end = text[-max(map(len, markers), default=1) :]
    if not any(marker[0] in end for marker in markers):
        return 0
    for length in range(len(end), 0, -1):
        if any(len(m) > length and m.startswith(end[-length:]) for m in markers):
            return length
    return 0
