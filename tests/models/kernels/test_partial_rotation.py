"""Heads of which only the first elements turn, as those of hybrids do."""

from __future__ import annotations

import pytest
import torch

import triton_cases
from cortex.models.kernels import cpu, reference
from interpreted import Interpreted

HALF, SIZE = 5, 24


def turned_slowly(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """The definition, pair by pair."""
    out = x.clone()
    for i in range(HALF):
        c, s = cosines[:, None, i], sines[:, None, i]
        out[..., i] = x[..., i] * c - x[..., HALF + i] * s
        out[..., HALF + i] = x[..., HALF + i] * c + x[..., i] * s
    return out


def test_elements_without_a_cosine_stay_as_they_are(kernels: cpu.CpuKernels) -> None:
    x, angles = torch.randn(3, 2, SIZE), torch.randn(3, HALF)

    expected = turned_slowly(x, angles.cos(), angles.sin())

    for operations in (reference, kernels):
        found = operations.rotate(x, angles.cos(), angles.sin())
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[..., 2 * HALF :], x[..., 2 * HALF :])


@pytest.mark.parametrize(("heads", "kv_heads", "size", "half"), [(4, 2, 24, 5), (3, 3, 128, 16)])
def test_triton_agrees_and_stores_all_of_them(
    interpreted: Interpreted, heads: int, kv_heads: int, size: int, half: int
) -> None:
    queries, keys, values = interpreted(
        triton_cases.rotate_and_store_differences,
        *(heads, kv_heads, size, torch.float32),
        half=half,
    )

    assert queries < 2e-5
    assert keys < 2e-5
    assert values == 0
