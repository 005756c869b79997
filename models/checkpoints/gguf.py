"""The header of a GGUF file: metadata and where each tensor lies; no weights are read.

    "GGUF"  version u32  tensor count u64  entry count u64      little endian throughout
    entries:  key string  value type u32  value
    tensors:  name string  dimensions u32  sizes u64, innermost first  type u32  offset u64
    padding to ``general.alignment``, then the tensors' data, at offsets counted from here

A string is a u64 length and UTF-8; an array is an element type u32, a u64 count and its elements.
Source: docs/gguf.md of ggml-org/ggml. A header is not trusted: every length is compared with what
the file still holds before anything of that length is read. Files are read, not mapped, so one
that shrinks under our hands is an error here and not a SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from cortex.models.checkpoints.errors import CheckpointError, naming, shown
from cortex.models.checkpoints.files import open_file
from cortex.models.checkpoints.tensors import GGUF_TYPES, TensorInfo, check_layout, stored_bytes

MAX_HEADER_BYTES = 1 << 26
"""Four times the largest known; parsed, it takes up to 25 times as much memory."""

MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = (1 << 16) - 1  # the format's own limit for keys
MAX_ARRAY_ELEMENTS = 1 << 24
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4
MAX_TENSOR_BYTES = 1 << 62

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""Value type to its format character, the same for ``struct`` and (on Linux) ``array``."""

BLOCK_BYTES = 1 << 20
"""What is read of the file at a time."""

MIN_ENTRY_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The parsed header of one GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the header; raises CheckpointError."""
        with naming(path), BufferedReader(open_file(path)) as file:
            header = _Header(path, file)
            tensor_count, entry_count = header.counts()
            metadata = header.metadata(entry_count)
            tensors = header.tensors(tensor_count, _alignment(metadata))
            return cls(path, metadata, tensors)


class _Header:
    """Reads a header front to back and never asks for more than the file holds."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.file_bytes = os.fstat(file.fileno()).st_size
        self._block = b""
        self._block_at = 0  # in the file
        self._at = 0  # in the block

    @property
    def taken(self) -> int:
        return self._block_at + self._at

    @property
    def left(self) -> int:
        return self.file_bytes - self.taken

    def take(self, count: int, what: str) -> bytes:
        """Read *count* bytes, which are *what*."""
        if count > self.left:
            raise CheckpointError(
                f"{what} needs {count} bytes at byte {self.taken}, but the file "
                f"has only {self.left} more: it is truncated or damaged"
            )
        if self.taken + count > MAX_HEADER_BYTES:
            raise CheckpointError(f"the header is larger than the {MAX_HEADER_BYTES} bytes we read")
        if self._at + count > len(self._block):
            self._refill(count, what)
        data = self._block[self._at : self._at + count]
        self._at += count
        return data

    def _refill(self, count: int, what: str) -> None:
        """Have the next *count* bytes, which are *what*, and more in the block."""
        rest = self._block[self._at :]
        self._block_at, self._at = self.taken, 0
        self._block = rest + self.file.read(max(count, BLOCK_BYTES) - len(rest))
        if len(self._block) < count:
            raise CheckpointError(f"the file shrank while {what} was read")

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.number("Q", what)
        if length > limit:
            raise CheckpointError(f"{what} claims to be {length} bytes long")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{what} is not UTF-8: {exc.reason}") from None

    def counts(self) -> tuple[int, int]:
        """How many tensors and how many metadata entries follow."""
        magic = self.take(4, "the magic number")
        if magic != b"GGUF":
            raise CheckpointError(f"not a GGUF file: it begins with {magic!r}")
        version = self.number("I", "the version")
        if version in (0x02000000, 0x03000000):
            raise CheckpointError("a big-endian GGUF file; only little-endian ones are read")
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version} is not supported; 2 and 3 are")
        tensors, entries = self.number("Q", "the counts"), self.number("Q", "the counts")
        self._check_count(tensors, MAX_TENSORS, MIN_TENSOR_BYTES, "tensors")
        self._check_count(entries, MAX_ENTRIES, MIN_ENTRY_BYTES, "metadata entries")
        return tensors, entries

    def _check_count(self, count: int, limit: int, least_bytes: int, what: str) -> None:
        if count > limit:
            raise CheckpointError(f"claims {count} {what}, more than the {limit} we read")
        if count * least_bytes > self.left:
            raise CheckpointError(f"claims {count} {what}, but has only {self.left} more bytes")

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a metadata key", MAX_NAME_BYTES)
            if key in found:
                raise CheckpointError(f"metadata key {shown(key)} appears twice")
            what = f"metadata {shown(key)}"
            found[key] = self._value(self.number("I", what), what)
        return found

    def _value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what)
        if kind == BOOL:
            return self._booleans(1, what)[0]
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        raise CheckpointError(f"{what} has the unknown value type {kind}")

    def _array(self, what: str) -> list[Any]:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == ARRAY:
            raise CheckpointError(f"{what} is an array of arrays, which is not supported")
        if kind not in (STRING, BOOL) and kind not in SCALARS:
            raise CheckpointError(f"{what} is an array of the unknown value type {kind}")
        least = 8 if kind == STRING else struct.calcsize(SCALARS.get(kind, "B"))
        self._check_count(count, MAX_ARRAY_ELEMENTS, least, f"elements in {what}")
        if kind == STRING:
            return self._strings(count, what)
        if kind == BOOL:
            return self._booleans(count, what)
        values = array(SCALARS[kind])
        values.frombytes(self.take(count * values.itemsize, what))
        return values.tolist()

    def _strings(self, count: int, what: str) -> list[str]:
        """Read as ``string`` does, which reads those that are special: a vocabulary has 100,000."""
        found: list[str] = []
        while len(found) < count:
            found += self._plain_strings(count - len(found))
            if len(found) < count:
                found.append(self.string(what))
        return found

    def _plain_strings(self, count: int) -> list[str]:
        """Read up to *count* strings as far as they are whole in the block, and no longer."""
        block, at, found = self._block, self._at, []
        end = min(len(block), MAX_HEADER_BYTES - self._block_at)
        with contextlib.suppress(UnicodeDecodeError, struct.error):  # such a one is not taken
            for _ in range(count):
                begin = at + 8
                stop = begin + LENGTH.unpack_from(block, at)[0]
                if stop > end:
                    break
                found.append(block[begin:stop].decode())
                at = stop
        self._at = at
        return found

    def _booleans(self, count: int, what: str) -> list[bool]:
        data = self.take(count, what)
        if data.strip(b"\0\1"):
            raise CheckpointError(f"{what} holds a boolean that is neither 0 nor 1")
        return [byte == 1 for byte in data]

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """Read the table of tensors, which ends the header."""
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            tensor = self._tensor(alignment)
            if tensor.name in found:
                raise CheckpointError(f"tensor {shown(tensor.name)} appears twice")
            found[tensor.name] = tensor
        start = -(-self.taken // alignment) * alignment
        placed = {name: replace(info, offset=start + info.offset) for name, info in found.items()}
        check_layout(placed.values(), self.file_bytes)
        return placed

    def _tensor(self, alignment: int) -> TensorInfo:
        """One row of the table; its offset still counts from the start of the data."""
        name = self.string("a tensor's name", MAX_NAME_BYTES)
        what = f"tensor {shown(name)}"
        dimensions = self.number("I", what)
        if dimensions > MAX_DIMENSIONS:
            raise CheckpointError(f"{what} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
        sizes = [self.number("Q", what) for _ in range(dimensions)]
        number, offset = self.number("I", what), self.number("Q", what)
        if number not in GGUF_TYPES:
            raise CheckpointError(f"{what} is of the unknown type number {number}")
        if offset % alignment:
            raise CheckpointError(f"{what} lies at {offset}, which is not aligned to {alignment}")
        shape = tuple(reversed(sizes))
        nbytes = stored_bytes(name, shape, GGUF_TYPES[number])
        if nbytes > MAX_TENSOR_BYTES:
            raise CheckpointError(f"{what} of shape {shape} is absurdly large")
        return TensorInfo(name, shape, GGUF_TYPES[number].name, self.path, offset, nbytes)


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    is_power_of_two = type(alignment) is int and alignment > 0 and alignment.bit_count() == 1
    if not is_power_of_two:
        raise CheckpointError(f"general.alignment is {shown(alignment)}, which is no power of two")
    return int(alignment)
