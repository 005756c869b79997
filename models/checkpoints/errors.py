"""What can be wrong with a checkpoint's files."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint's files are damaged or of a kind we do not read; the text says which and why."""
