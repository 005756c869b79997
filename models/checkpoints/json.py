"""JSON out of a checkpoint, which is not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cortex.models.checkpoints.errors import CheckpointError, naming

MAX_FILE_BYTES = 1 << 24


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse *text*, an object without duplicate keys; raises CheckpointError that says *what*."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except CheckpointError as exc:
        raise CheckpointError(f"{what} {exc}") from None
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{what} is not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file such as config.json; raises CheckpointError."""
    with naming(path), path.open("rb") as file:
        text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise CheckpointError(f"larger than {MAX_FILE_BYTES} bytes")
    return parse_object(text, str(path))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"has the key {twice!r} twice")
    return found
