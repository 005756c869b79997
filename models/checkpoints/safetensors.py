"""The header of a safetensors file: where each tensor lies; no weights are read.

    header length N, u64 little endian │ N bytes of JSON │ the tensors' data
    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {…}}

Offsets count from the start of the data. Source: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cortex.models.checkpoints.errors import CheckpointError, naming
from cortex.models.checkpoints.json import parse_object
from cortex.models.checkpoints.tensors import (
    SAFETENSORS_TYPES,
    TensorInfo,
    check_layout,
    stored_bytes,
)

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The parsed header of one safetensors file."""

    path: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read the header; raises CheckpointError."""
        with naming(path), path.open("rb") as file:
            return cls(path, _tensors(file))


def _tensors(file: BinaryIO) -> dict[str, TensorInfo]:
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < 8:
        raise CheckpointError(f"not a safetensors file: it has only {file_bytes} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(
            f"claims a header of {length} bytes, but has {file_bytes - 8} more: it is truncated, "
            "damaged or no safetensors file"
        )
    entries = parse_object(file.read(length), "the header")
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in entries.items()}
    check_layout(tensors.values(), file_bytes)
    return tensors


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(kind), "shape": list(sizes), "data_offsets": [begin, end]}:
            pass
        case _:
            raise CheckpointError(f"tensor {name!r} has no dtype, shape and data_offsets")
    if not all(type(size) is int and size >= 0 for size in (*sizes, begin, end)):
        raise CheckpointError(f"tensor {name!r} has sizes that are no whole numbers: {sizes}")
    if kind not in SAFETENSORS_TYPES:
        raise CheckpointError(f"tensor {name!r} is of the unknown type {kind!r}")
    shape = tuple(sizes)
    nbytes = stored_bytes(name, shape, SAFETENSORS_TYPES[kind])
    if end - begin != nbytes:
        raise CheckpointError(
            f"tensor {name!r} of shape {shape} and type {kind} takes {nbytes} bytes, "
            f"but its data_offsets span {end - begin}"
        )
    return TensorInfo(name, shape, kind, data_start + begin, nbytes)
