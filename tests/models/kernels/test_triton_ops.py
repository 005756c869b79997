"""The other kernels in Triton, interpreted, against plain torch.

The interpreter rounds to bfloat16 towards zero, so results are held to a unit of the last place.
"""

from __future__ import annotations

import pytest
import torch

import triton_cases
from interpreted import Interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLACES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""A unit of the last place, of numbers up to 1; the largest here are below 8."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1, 4096), (5, 96), (3, 7, 80), (2, 40, 128)])
def test_rms_norm_agrees(
    interpreted: Interpreted, rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = interpreted(triton_cases.rms_norm_difference, rows, dtype)

    assert found < 8 * PLACES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (5, 96)])
def test_a_sum_is_made_and_normalised_at_once(
    interpreted: Interpreted, rows: int, columns: int, dtype: torch.dtype
) -> None:
    total, normed = interpreted(triton_cases.add_rms_norm_differences, rows, columns, dtype)

    assert total < 8 * PLACES[dtype]
    assert normed < 8 * PLACES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1025), (3, 64)])
def test_silu_multiply_agrees(
    interpreted: Interpreted, rows: int, columns: int, dtype: torch.dtype
) -> None:
    found = interpreted(triton_cases.silu_multiply_difference, rows, columns, dtype)

    assert found < 8 * PLACES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_bias_agrees(interpreted: Interpreted, dtype: torch.dtype) -> None:
    assert interpreted(triton_cases.add_bias_difference, 3, 1100, dtype) < 8 * PLACES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 2, 64), (7, 1, 80), (6, 3, 96), (32, 8, 128), (2, 2, 256)]
)
def test_queries_and_keys_are_turned_and_the_cache_is_written(
    interpreted: Interpreted, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    queries, keys, values = interpreted(
        triton_cases.rotate_and_store_differences, heads, kv_heads, size, dtype
    )

    assert queries < 8 * PLACES[dtype]
    assert keys < 8 * PLACES[dtype]
    assert values == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 70, 100), (65, 33, 64), (130, 130, 40)]
)
def test_a_batch_invariant_product_agrees(
    interpreted: Interpreted, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    found = interpreted(triton_cases.linear_difference, rows, outputs, inputs, dtype)

    assert found < 64 * PLACES[dtype]  # outputs are below 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_batch_invariant_product_has_the_same_bits_alone(
    interpreted: Interpreted, dtype: torch.dtype
) -> None:
    assert interpreted(triton_cases.is_same_linear_alone, 70, 40, 100, dtype)
