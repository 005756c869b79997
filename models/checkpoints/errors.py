"""What can be wrong with a checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint's files are damaged or of a kind we do not read; the text says which and why."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name *path* in whatever is wrong with it; raises CheckpointError."""
    try:
        yield
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {exc}") from None
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
