"""The header of a safetensors file: where each tensor lies; no weights are read.

    header length N, u64 little endian │ N bytes of JSON │ the tensors' data
    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {…}}

Offsets count from the start of the data. Source: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import open_file
from cortex.models.checkpoints.json import parse_object
from cortex.models.checkpoints.tensors import (
    SAFETENSORS_TYPES,
    TensorInfo,
    check_layout,
    stored_bytes,
)

MAX_HEADER_BYTES = 1 << 25
"""Of a quarter of a million tensors; parsed, it takes up to 25 times as much memory. The format
itself would allow three times this."""

MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 62


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The parsed header of one safetensors file."""

    path: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read the header; raises CheckpointError."""
        with naming(path), BufferedReader(open_file(path)) as file:
            return cls(path, _tensors(path, file))


def _tensors(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
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
    tensors = {
        name: _tensor(path, name, entry, data_start=8 + length) for name, entry in entries.items()
    }
    check_layout(tensors.values(), file_bytes)
    return tensors


def _tensor(path: Path, name: str, entry: Any, *, data_start: int) -> TensorInfo:
    what = f"tensor {shown(name)}"
    match entry:
        case {"dtype": str(kind), "shape": list(sizes), "data_offsets": [begin, end]}:
            pass
        case _:
            raise CheckpointError(f"{what} has no dtype, shape and data_offsets")
    if len(sizes) > MAX_DIMENSIONS:
        raise CheckpointError(f"{what} has {len(sizes)} dimensions, more than {MAX_DIMENSIONS}")
    if not all(type(size) is int and 0 <= size <= MAX_SIZE for size in (*sizes, begin, end)):
        raise CheckpointError(f"{what} has sizes that are no whole numbers: {shown(sizes)}")
    if kind not in SAFETENSORS_TYPES:
        raise CheckpointError(f"{what} is of the unknown type {shown(kind)}")
    shape = tuple(sizes)
    nbytes = stored_bytes(name, shape, SAFETENSORS_TYPES[kind])
    if end - begin != nbytes:
        raise CheckpointError(
            f"{what} of shape {shape} and type {kind} takes {nbytes} bytes, "
            f"but its data_offsets span {end - begin}"
        )
    return TensorInfo(name, shape, kind, path, data_start + begin, nbytes)
