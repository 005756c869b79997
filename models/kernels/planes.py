"""Rows of blocks with like fields side by side, as a GPU reads them.

A stored block begins at any even byte, so a thread could load two bytes of it at a time. A planar
row is the same bytes in another order: the codes of all its blocks, then what else each block has,
field by field. Codes are then loaded sixteen bytes at a time, and a row still stands by itself:
rows can be cut, stacked and looked up.

    stored   | d q q q | d q q q | d q q q |        Q4_0; Q5_1 has q q q, h h h, dm dm dm,
    planar   | q q q q q q q q q | d d d |          Q4_K q q q, s s s, dm dm dm

``FIELDS`` says for each type which bytes of a block are a field, in the order of the planes. A pair
of d and m stays together, as do all fields of up to eight bytes that are read together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cortex.models.quantization import STORED, Part

FIELDS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Q4_0": ((2, 18), (0, 2)),
    "Q4_1": ((4, 20), (0, 4)),
    "Q5_0": ((6, 22), (2, 6), (0, 2)),
    "Q5_1": ((8, 24), (4, 8), (0, 4)),
    "Q8_0": ((2, 34), (0, 2)),
    "IQ4_NL": ((2, 18), (0, 2)),
    "Q2_K": ((16, 80), (0, 16), (80, 84)),
    "Q3_K": ((32, 96), (0, 32), (96, 108), (108, 110)),
    "Q4_K": ((16, 144), (4, 16), (0, 4)),
    "Q5_K": ((48, 176), (16, 48), (4, 16), (0, 4)),
    "Q6_K": ((0, 128), (128, 192), (192, 208), (208, 210)),
    "IQ4_XS": ((8, 136), (4, 8), (0, 4)),
    "FP8": ((4, 132), (0, 4)),
}


def planar(part: Part) -> Part:
    """Return *part*, quantised and as stored, with planar rows; takes its memory once more."""
    assert not part.is_planar
    rows, size = part.data.size(0), STORED[part.kind].block_bytes
    blocks = part.data.view(rows, -1, size)
    planes = [blocks[..., first:end].flatten(1) for first, end in FIELDS[part.kind]]
    return replace(part, data=torch.cat(planes, dim=1), is_planar=True)


def stored(kind: str, data: Tensor) -> Tensor:
    """Return planar rows, uint8 [rows, bytes of a row], with the blocks of the format."""
    blocks = data.size(1) // STORED[kind].block_bytes
    sizes = [end - first for first, end in FIELDS[kind]]
    planes = torch.split(data, [blocks * size for size in sizes], dim=1)
    found = data.new_empty(data.size(0), blocks, STORED[kind].block_bytes)
    for plane, (first, end) in zip(planes, FIELDS[kind], strict=True):
        found[..., first:end] = plane.reshape(data.size(0), blocks, end - first)
    return found.flatten(1)
