"""Products with packed weights in Triton, interpreted, against float64's of the same weights.

The interpreter rounds to bfloat16 towards zero, so in 16 bits only float16 tells much.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import quantized_cases
from cortex.models.kernels.planes import planar, stored
from interpreted import Interpreted
from quantized_cases import KINDS, random_part

SMALL = {"Q4_0": 96, "Q4_1": 96, "Q5_0": 96, "Q5_1": 96, "Q8_0": 96, "IQ4_NL": 96, "FP8": 384}
"""Columns that are no whole number of tiles; of types of 256, three blocks."""


@pytest.mark.parametrize("kind", KINDS)
def test_planar_rows_hold_the_same_bytes(kind: str) -> None:
    part = random_part(kind, 3, 512)

    found = planar(part)

    assert not torch.equal(found.data, part.data)
    assert torch.equal(found.data.sort(dim=1).values, part.data.sort(dim=1).values)
    assert torch.equal(stored(kind, found.data), part.data)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up_exactly_and_zeros_where_there_are_none(
    interpreted: Interpreted, kind: str
) -> None:
    assert interpreted(quantized_cases.rows_difference, kind, SMALL.get(kind, 768)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_multiplied(interpreted: Interpreted, kind: str) -> None:
    columns = SMALL.get(kind, 768)

    found = interpreted(
        quantized_cases.product_difference, kind, rows=1, outputs=3, columns=columns
    )

    assert found < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_are_multiplied(interpreted: Interpreted, kind: str) -> None:
    columns = SMALL.get(kind, 768)
    how = {"rows": 3, "outputs": 9, "columns": columns, "dtype": torch.float16}

    assert interpreted(quantized_cases.product_difference, kind, **how) < 8e-3


@pytest.mark.parametrize("rows", [18, 65, 256])
def test_more_rows_are_multiplied_in_other_ways(interpreted: Interpreted, rows: int) -> None:
    how = {"rows": rows, "outputs": 33, "columns": 96, "dtype": torch.float16}

    assert interpreted(quantized_cases.product_difference, "Q5_0", **how) < 1e-2


@pytest.mark.parametrize("rows", [1, 3, 66])
def test_a_batch_invariant_product_agrees(interpreted: Interpreted, rows: int) -> None:
    how = {"rows": rows, "outputs": 33, "columns": 256, "is_batch_invariant": True}

    assert interpreted(quantized_cases.product_difference, "Q4_K", **how) < 1e-5


def test_a_row_of_a_batch_invariant_product_has_the_same_bits_alone(
    interpreted: Interpreted,
) -> None:
    how = {"rows": 66, "outputs": 20, "columns": 96}

    assert interpreted(quantized_cases.is_same_product_alone, "Q4_1", **how)


def test_programs_that_share_columns_are_added_up(interpreted: Interpreted) -> None:
    assert interpreted(quantized_cases.split_product_difference) < 8e-3


def test_a_large_matrix_is_unpacked_in_pieces(interpreted: Interpreted) -> None:
    assert interpreted(quantized_cases.piecewise_product_difference) < 1e-5


def test_parts_of_several_types_are_stacked(interpreted: Interpreted) -> None:
    assert interpreted(quantized_cases.mixed_product_difference) < 1e-5


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(5, 3), (128, 8), (4, 4)])
def test_the_likeliest_experts_are_chosen(
    interpreted: Interpreted, experts: int, top_k: int, *, is_normalised: bool
) -> None:
    is_same, difference = interpreted(
        quantized_cases.route_differences, 3, experts, top_k, is_normalised=is_normalised
    )

    assert is_same
    assert difference < 1e-6


@pytest.mark.parametrize("experts", [5, 8])
def test_no_id_is_beyond_the_experts_whatever_the_logits(
    interpreted: Interpreted, experts: int
) -> None:
    least, largest = interpreted(quantized_cases.ids_of_what_is_no_number, experts)

    assert 0 <= least <= largest < experts


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_preparing_experts_goes_every_way_that_serving_them_can(
    interpreted: Interpreted, *, is_batch_invariant: bool
) -> None:
    found = interpreted(quantized_cases.prepared_launches, is_batch_invariant=is_batch_invariant)

    every = ["_pairs_by_expert 16", "_pairs_by_expert 64", "_pairs_by_themselves"]
    assert found == (every[:1] if is_batch_invariant else every)


@pytest.mark.parametrize("tokens", [2, 30, 60])
@pytest.mark.parametrize("kinds", [("F32",) * 3, ("Q4_0", "Q4_0", "Q8_0")], ids=["dense", "packed"])
def test_tokens_go_through_their_experts(
    interpreted: Interpreted, kinds: Sequence[str], tokens: int
) -> None:
    assert interpreted(quantized_cases.experts_difference, kinds, tokens=tokens) < 1e-5


def test_experts_of_16_bits_agree(interpreted: Interpreted) -> None:
    how = {"tokens": 25, "dtype": torch.float16}

    assert interpreted(quantized_cases.experts_difference, ("F16",) * 3, **how) < 2e-2


def test_a_token_has_the_same_bits_alone_and_in_company(interpreted: Interpreted) -> None:
    assert interpreted(quantized_cases.is_same_expert_alone, 40)


def test_nothing_gives_nothing(interpreted: Interpreted) -> None:
    assert interpreted(quantized_cases.of_nothing) == [(0, 5), (0, 32), (0, 2), (0, 2), (0, 32)]
