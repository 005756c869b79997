"""What can be wrong with a checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 200


class CheckpointError(ValueError):
    """A checkpoint's files are damaged or of a kind we do not read; the text says which and why."""


def shown(value: Any) -> str:
    """Return *value*, which came out of a file, as an error may repeat it: printable and short."""
    if isinstance(value, str):
        value = value[: SHOWN_CHARACTERS + 1]
    elif isinstance(value, int) and value.bit_length() > SHOWN_CHARACTERS:
        return f"a number of {value.bit_length()} bits"
    elif isinstance(value, (list, tuple)):
        value = value[:SHOWN_CHARACTERS]
    try:
        text = ascii(value)
    except RecursionError:
        return "a value nested too deeply to show"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def listed(names: Iterable[str]) -> str:
    """Return the first three of *names*, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name *path* in whatever is wrong with it; raises CheckpointError."""
    try:
        yield
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {exc}") from None
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
