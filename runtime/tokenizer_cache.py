"""Tokenizers by the files they were read from, so that no file is parsed twice in a row.

Parsing is the one part of a load that holds up the supervisor: the library keeps the interpreter's
lock throughout, 0.1 s for 49,000 tokens, 0.8 s for Qwen3's 152,000 (2 busy cores, 2026-11-21). A
model that is loaded again, or beside another of the same file, does without. The last few are kept,
at some 60 MB for 152,000 tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.runtime.tokenizer import Tokenizer

KEPT = 2
Identity = tuple[tuple[int, int, int, int], ...]


class TokenizerCache:
    """The last tokenizers; several threads may ask."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._all: OrderedDict[Identity, Tokenizer] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, files: Sequence[Path], build: Callable[[], Tokenizer]) -> Tokenizer:
        """Return the tokenizer in *files*, which *build* reads; a changed file is read anew."""
        identity = tuple(_identity(file) for file in files if file.exists())
        with self._lock:
            tokenizer = self._all.pop(identity, None) or build()
            self._all[identity] = tokenizer
            while len(self._all) > self._kept:
                self._all.popitem(last=False)
        return tokenizer


def _identity(file: Path) -> tuple[int, int, int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
