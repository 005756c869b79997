"""JSON out of a checkpoint, which is not trusted."""

from __future__ import annotations

import json
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import open_file

MAX_FILE_BYTES = 1 << 24


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse *text*, an object without duplicate keys; raises CheckpointError that says *what*."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        _refuse_half_characters(text, value)
    except CheckpointError as exc:
        raise CheckpointError(f"{what} {exc}") from None
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{what} is not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file such as config.json; raises CheckpointError."""
    return parse_object(read_bytes(path, MAX_FILE_BYTES), str(path))


def read_bytes(path: Path, limit: int) -> bytes:
    """Read all of *path*, which must not exceed *limit* bytes; raises CheckpointError."""
    with naming(path), BufferedReader(open_file(path)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"larger than {limit} bytes")
        return file.read(size)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"has the key {shown(name)} twice")
        found[name] = value
    return found


def _refuse_half_characters(text: bytes, value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no answer of ours could repeat."""
    if rb"\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
