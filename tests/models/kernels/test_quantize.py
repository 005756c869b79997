"""Floats to blocks: bit for bit as the gguf library has them, and as near as the type allows."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from cortex.models.checkpoints.tensors import QUANTS
from cortex.models.kernels import cpu, quantize, reference
from cortex.models.kernels.quantize import QUANTIZE
from cortex.models.quantization import STORED
from random_blocks import columns_of

OURS = ("IQ4_NL", "FP8")
AS_GGUF = [kind for kind in QUANTIZE if kind not in OURS]
STEPS = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}
"""Into how many a block's largest number, or with a minimum its range, is cut."""


def awkward(columns: int) -> Tensor:
    """Rows of zeros, of one number, of ties, of few bits, tiny, large, far from zero."""
    torch.manual_seed(1)
    x = torch.randn(12, columns)
    x[0] = 0.0
    x[1] = -0.37
    x[2, ::2], x[2, 1::2] = 1.0, -1.0
    x[3, ::2], x[3, 1::2] = -1.0, 1.0
    x[4] = x[4].bfloat16().float()
    x[5] *= 1e-7
    x[6] *= 1e-30
    x[7] *= 1e4
    x[8] = x[8].abs() + 100
    x[9] = x[9].sign() * torch.arange(columns) / 7
    x[10] = x[10].round() / 2
    return x


@pytest.mark.parametrize("kind", AS_GGUF)
@pytest.mark.parametrize("how", ["C", "torch"])
def test_blocks_are_those_of_the_gguf_library(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.cat((awkward(256), torch.randn(400, 256)))
    if how == "torch":
        monkeypatch.setattr(cpu, "kernels", lambda: None)

    ours = quantize.quantize(kind, x)

    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(ours, torch.from_numpy(np.array(theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", QUANTS.values())
def test_the_kernels_and_torch_agree(kind: str, dtype: torch.dtype) -> None:
    x = torch.cat((awkward(256), torch.randn(100, 256))).to(dtype)

    packed = quantize.quantize(kind, x)

    assert torch.equal(packed, quantize.by_torch(kind, x, torch.empty_like(packed)))


def test_quantising_without_memory_is_an_error(
    kernels: cpu.CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.library, "cortex_quantize", lambda *_: -1)

    with pytest.raises(MemoryError):
        quantize.quantize("Q8_0", torch.ones(1, 32))


def test_older_cpus_quantise_the_same(other_kernels: dict[str, cpu.CpuKernels]) -> None:
    x = torch.cat((awkward(256), torch.randn(20, 256)))
    for kind in QUANTS.values():
        packed = quantize.quantize(kind, x)

        for other in other_kernels.values():
            found = torch.empty_like(packed)
            other.quantize(kind, x, found)
            assert torch.equal(found, packed)


@pytest.mark.parametrize("kind", sorted(STEPS))
def test_a_number_is_at_most_a_step_off(kind: str) -> None:
    x = torch.randn(200, 64)

    found = reference.dequantize(kind, quantize.quantize(kind, x))

    blocks = x.view(200, -1, 32)
    largest = blocks.abs().amax(-1)
    spread = blocks.amax(-1) - blocks.amin(-1) if kind.endswith("1") else largest
    off = (found - x).view(200, -1, 32).abs().amax(-1)
    # half a step; a whole one at the end that the number farthest from zero is not at
    share = 1.0 if kind in ("Q4_0", "Q5_0") else 0.5
    assert (off <= share * spread / STEPS[kind] + largest * 2**-10).all()


def test_float8_keeps_three_bits_of_every_number() -> None:
    x = torch.cat((awkward(256), torch.randn(400, 256)))

    found = reference.dequantize("FP8", quantize.quantize("FP8", x))

    largest = x.view(len(x), -1, 128).abs().amax(-1, keepdim=True).expand(-1, -1, 128).flatten(1)
    assert ((found - x).abs() <= x.abs() / 16 * 1.001 + largest / 448 * 2**-10 + 1e-37).all()


def test_float8_meets_the_largest_number_of_a_block() -> None:
    x = torch.randn(50, 256)

    found = reference.dequantize("FP8", quantize.quantize("FP8", x))

    largest = x.view(50, 2, 128).abs().amax(-1)
    torch.testing.assert_close(found.view(50, 2, 128).abs().amax(-1), largest)


def test_the_curve_fits_weights_better_than_equal_steps() -> None:
    x = torch.cat((awkward(256), torch.randn(100, 256)))

    curved, equal = (
        (reference.dequantize(kind, quantize.quantize(kind, x)) - x).square().sum()
        for kind in ("IQ4_NL", "Q4_0")
    )

    assert curved < 0.85 * equal


@pytest.mark.parametrize("kind", QUANTIZE)
def test_zeros_and_numbers_too_small_for_a_scale_become_zeros(kind: str) -> None:
    columns = columns_of(kind, 2)
    x = torch.stack((torch.zeros(columns), torch.full((columns,), 1e-44)))

    assert (reference.dequantize(kind, quantize.quantize(kind, x)).abs() <= 1e-44).all()


@pytest.mark.parametrize("kind", QUANTIZE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_two_bytes_are_quantised_as_they_are(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, columns_of(kind, 2)).to(dtype)

    assert torch.equal(quantize.quantize(kind, x), quantize.quantize(kind, x.float()))


@pytest.mark.parametrize("kind", QUANTIZE)
def test_torch_quantises_a_large_matrix_in_pieces(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = columns_of(kind, 2)
    x = torch.randn(10, columns)
    whole = quantize.quantize(kind, x)

    monkeypatch.setattr(quantize, "AT_ONCE", 3 * columns)

    assert torch.equal(quantize.by_torch(kind, x, torch.empty_like(whole)), whole)
    assert quantize.quantize(kind, x[:0]).shape == (0, whole.size(1))


@pytest.mark.parametrize("kind", QUANTIZE)
def test_rows_of_part_of_a_block_are_refused(kind: str) -> None:
    size = STORED[kind].block_elements

    with pytest.raises(ValueError, match=rf"rows of {size + 16} .* {kind} blocks of {size}"):
        quantize.quantize(kind, torch.zeros(2, size + 16))


def test_every_quantisation_that_can_be_asked_for_is_there() -> None:
    assert set(QUANTS.values()) <= set(QUANTIZE)
