"""What a checkpoint's header says of one tensor, and how many bytes each stored type takes.

Quantised types store elements in blocks that share their scales, always along the innermost
dimension (ggml-common.h of ggml-org/llama.cpp). GGUF names types by number; safetensors by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from cortex.models.checkpoints.errors import CheckpointError, shown


class StoredType(NamedTuple):
    """A type's name, and the bytes that hold one block of so many elements."""

    name: str
    block_elements: int
    block_bytes: int


GGUF_TYPES = {
    0: StoredType("F32", 1, 4),
    1: StoredType("F16", 1, 2),
    2: StoredType("Q4_0", 32, 18),
    3: StoredType("Q4_1", 32, 20),
    6: StoredType("Q5_0", 32, 22),
    7: StoredType("Q5_1", 32, 24),
    8: StoredType("Q8_0", 32, 34),
    9: StoredType("Q8_1", 32, 40),
    10: StoredType("Q2_K", 256, 84),
    11: StoredType("Q3_K", 256, 110),
    12: StoredType("Q4_K", 256, 144),
    13: StoredType("Q5_K", 256, 176),
    14: StoredType("Q6_K", 256, 210),
    15: StoredType("Q8_K", 256, 292),
    16: StoredType("IQ2_XXS", 256, 66),
    17: StoredType("IQ2_XS", 256, 74),
    18: StoredType("IQ3_XXS", 256, 98),
    19: StoredType("IQ1_S", 256, 50),
    20: StoredType("IQ4_NL", 32, 18),
    21: StoredType("IQ3_S", 256, 110),
    22: StoredType("IQ2_S", 256, 82),
    23: StoredType("IQ4_XS", 256, 136),
    24: StoredType("I8", 1, 1),
    25: StoredType("I16", 1, 2),
    26: StoredType("I32", 1, 4),
    27: StoredType("I64", 1, 8),
    28: StoredType("F64", 1, 8),
    29: StoredType("IQ1_M", 256, 56),
    30: StoredType("BF16", 1, 2),
    34: StoredType("TQ1_0", 256, 54),
    35: StoredType("TQ2_0", 256, 66),
    39: StoredType("MXFP4", 32, 17),
    40: StoredType("NVFP4", 64, 36),
    41: StoredType("Q1_0", 128, 18),
}
"""Every type a current GGUF file may hold; we multiply with those in ``LOADABLE``."""

SAFETENSORS_TYPES = {
    name: StoredType(name, 1, size)
    for size, names in {
        1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
        2: ("F16", "BF16", "I16", "U16"),
        4: ("F32", "I32", "U32"),
        8: ("F64", "I64", "U64", "C64"),
    }.items()
    for name in names
}

FP8 = StoredType("FP8", 128, 132)
"""Our own, in memory and in no file: a float32 scale, then 128 floats of 8 bits (e4m3)."""

LOADABLE = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
"""The types a file may store a weight in; ``models.quantization`` implements these and FP8."""

QUANTS = {
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
    "q4_1": "Q4_1",
    "q5_0": "Q5_0",
    "q5_1": "Q5_1",
    "fp8": "FP8",
}
"""What a dense checkpoint can become while it loads, and the type its weights then have."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    name: str
    shape: tuple[int, ...]  # torch order, outermost first
    type: str
    path: Path
    offset: int  # from the start of the file
    nbytes: int


def stored_bytes(name: str, shape: tuple[int, ...], stored: StoredType) -> int:
    """Bytes of a tensor; raises CheckpointError where its rows are no whole number of blocks."""
    innermost = shape[-1] if shape else 1
    if innermost % stored.block_elements:
        raise CheckpointError(
            f"tensor {shown(name)}: rows of {innermost} elements are no whole number of "
            f"{stored.name} blocks of {stored.block_elements}"
        )
    return prod(shape) // stored.block_elements * stored.block_bytes


def check_layout(tensors: Iterable[TensorInfo], file_bytes: int) -> None:
    """Raise CheckpointError where a tensor ends behind its one file or two of them overlap."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset + tensor.nbytes > file_bytes:
            raise CheckpointError(
                f"tensor {shown(tensor.name)} ends at byte {tensor.offset + tensor.nbytes}, "
                f"but the file ends at {file_bytes}: it is truncated or damaged"
            )
        if tensor.offset < end:
            raise CheckpointError(f"tensors {shown(before)} and {shown(tensor.name)} overlap")
        if tensor.nbytes:
            end, before = tensor.offset + tensor.nbytes, tensor.name
