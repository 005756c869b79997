"""Stored blocks to numbers, against the gguf library; the C kernels and torch alike."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from cortex.models.checkpoints.tensors import GGUF_TYPES, LOADABLE, QUANTS
from cortex.models.kernels import cpu, reference
from cortex.models.kernels.blocks import UNPACK
from cortex.models.parallel import Cut
from cortex.models.quantization import DENSE, STORED, Matrix, Part, row_bytes
from random_blocks import HALVES, PACKED, columns_of

Dequantize = Callable[[str, Tensor], Tensor]


def by_kernels(kind: str, data: Tensor) -> Tensor:
    kernels = cpu.kernels()
    assert kernels is not None, "the tests need a C compiler"
    return kernels.rows(Part(kind, data.contiguous()), torch.arange(data.size(0)))


BOTH = pytest.mark.parametrize("dequantize", [by_kernels, reference.dequantize])
IN_FILES = [kind for kind in PACKED if kind in LOADABLE]


def by_gguf(kind: str, data: Tensor) -> Tensor:
    values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(values, np.float32))


def with_finite_scales(kind: str, data: Tensor) -> Tensor:
    """Clear the exponent's lowest bit of the float16 fields, so that none is inf or NaN."""
    blocks = data.view(data.size(0), -1, STORED[kind].block_bytes)
    for offset in HALVES[kind]:
        blocks[:, :, offset + 1] &= 0xFB
    return data


@BOTH
@pytest.mark.parametrize("kind", IN_FILES)
@settings(max_examples=30, deadline=None)
@given(blocks=st.data())
def test_blocks_of_any_bytes_mean_what_gguf_says(
    dequantize: Dequantize, kind: str, blocks: st.DataObject
) -> None:
    shape = (3, row_bytes(kind, columns_of(kind, 2)))
    data = torch.from_numpy(blocks.draw(npst.arrays(np.uint8, shape)))
    data = with_finite_scales(kind, data)

    assert torch.equal(dequantize(kind, data), by_gguf(kind, data))


@BOTH
@pytest.mark.parametrize("kind", IN_FILES)
@pytest.mark.parametrize("scale", [0.0, -0.0, 6e-8, -1.0, 65504.0, -65504.0])
@pytest.mark.parametrize("quants", [0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF])
def test_extreme_blocks_mean_what_gguf_says(
    dequantize: Dequantize, kind: str, scale: float, quants: int
) -> None:
    data = torch.full((1, STORED[kind].block_bytes), quants, dtype=torch.uint8)
    for offset in HALVES[kind]:
        data[0, offset : offset + 2] = torch.tensor([scale]).half().view(torch.uint8)

    assert torch.equal(dequantize(kind, data), by_gguf(kind, data))


@BOTH
@pytest.mark.parametrize("kind", IN_FILES)
def test_every_byte_in_every_place_means_what_gguf_says(dequantize: Dequantize, kind: str) -> None:
    size = STORED[kind].block_bytes
    data = (torch.arange(256)[:, None] + 7 * torch.arange(size)).to(torch.uint8)

    data = with_finite_scales(kind, data)

    assert torch.equal(dequantize(kind, data), by_gguf(kind, data))


@BOTH
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-42, 3e38, 0.1])
def test_every_float8_is_exact(dequantize: Dequantize, scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scales = torch.full((2, 1), scale).view(torch.uint8)
    data = torch.cat((scales, codes.view(2, 128)), dim=1).view(1, -1)

    values = dequantize("FP8", data)

    expected = codes.view(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(values[0], expected, rtol=0, atol=0, equal_nan=True)


@BOTH
def test_every_float16_is_exact(dequantize: Dequantize) -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    data = halves.view(1, -1).view(torch.uint8)

    values = dequantize("F16", data)

    torch.testing.assert_close(values[0], halves.float(), rtol=0, atol=0, equal_nan=True)


@BOTH
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_rows_of_any_length_are_exact(
    dequantize: Dequantize, columns: int, dtype: torch.dtype
) -> None:
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    rows = torch.randn(3, columns).to(dtype)

    assert torch.equal(dequantize(kind, rows.view(torch.uint8)), rows.float())


def test_every_type_has_the_size_the_gguf_library_gives_it() -> None:
    ours = {stored.name: (number, *stored[1:]) for number, stored in GGUF_TYPES.items()}

    theirs = {kind.name: (kind, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: theirs[name] for name in ours if name in theirs} == ours


def test_every_stored_type_is_implemented() -> None:
    assert set(STORED) == set(cpu.KINDS) == set(UNPACK) | set(DENSE)
    assert set(LOADABLE) == set(STORED) - {"FP8"}
    assert set(QUANTS.values()) < set(STORED)


def test_a_matrix_counts_its_packed_bytes() -> None:
    matrix = Matrix((Cut.whole(5),), Cut.whole(64))
    matrix.fill([Part("Q4_0", torch.zeros(5, 36, dtype=torch.uint8))])

    assert matrix.bytes == 5 * 36


def test_a_matrix_keeps_its_bytes_in_any_floating_dtype() -> None:
    matrix = Matrix((Cut.whole(5),), Cut.whole(64))
    matrix.fill([Part("Q4_0", torch.zeros(5, 36, dtype=torch.uint8))])

    assert matrix.half().parts[0].data.dtype == torch.uint8
