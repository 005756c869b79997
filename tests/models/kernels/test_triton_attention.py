"""Paged attention in Triton, interpreted, against plain torch; and how steps are cut for it.

Inside a product the interpreter has float32 in place of 16 bits, and it rounds to bfloat16 towards
zero. The compiled kernels are held to the same cases in ``tests/gpu``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import triton_cases
from cortex.models.kernels import attention_cut
from cortex.models.kernels.attention_cut import Work
from cortex.models.kernels.cuda_attention import Shape
from interpreted import Interpreted

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def shape(
    heads: int = 4, kv_heads: int = 2, size: int = 64, dtype: torch.dtype = torch.float32
) -> Shape:
    return Shape(heads, kv_heads, size, 16, dtype, "cpu")


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("like", "lengths"),
    [
        (shape(4, 2, 64), [(0, 5), (37, 1), (20, 16)]),  # ragged, and ends on a block's end
        (shape(8, 1, 128), [(299, 1), (0, 1), (130, 1)]),  # single tokens, in splits
        (shape(2, 2, 80), [(0, 19), (5, 0), (33, 2)]),  # no padding of heads, a silent sequence
        (shape(7, 1, 96), [(30, 21)]),  # a group that divides no tile, a tile's end in a sequence
        (shape(6, 2, 256), [(40, 3), (1, 1)]),
        (shape(40, 2, 64), [(17, 2)]),  # a group that needs a larger tile than its own
    ],
)
def test_attention_agrees(
    interpreted: Interpreted, like: Shape, lengths: list[tuple[int, int]], batch_invariant: bool
) -> None:
    found = interpreted(
        triton_cases.attention_difference, like, lengths, batch_invariant=batch_invariant
    )

    assert found < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[(3, 20)], [(100, 1), (12, 1)]])
def test_attention_of_16_bits_agrees(
    interpreted: Interpreted, dtype: torch.dtype, lengths: list[tuple[int, int]]
) -> None:
    found = interpreted(
        triton_cases.attention_difference, shape(dtype=dtype), lengths, batch_invariant=False
    )

    assert found < TOLERANCES[dtype]


@pytest.mark.parametrize("context", [1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 129, 300])
def test_a_single_token_sees_all_of_its_context(interpreted: Interpreted, context: int) -> None:
    lengths = [(context - 1, 1)]

    for batch_invariant in (False, True):
        found = interpreted(
            triton_cases.attention_difference,
            shape(2, 1, 16),
            lengths,
            batch_invariant=batch_invariant,
        )
        assert found < TOLERANCES[torch.float32]


def test_contexts_of_several_fixed_splits_are_merged(interpreted: Interpreted) -> None:
    lengths = [(2 * attention_cut.SPLIT_TOKENS + 9, 1), (attention_cut.SPLIT_TOKENS - 1, 1), (4, 1)]

    found = interpreted(
        triton_cases.attention_difference, shape(2, 2, 16), lengths, batch_invariant=True
    )

    assert found < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("like", "lengths"),
    [
        (shape(4, 2, 64), [(0, 21), (37, 2), (60, 1)]),
        (shape(7, 1, 32), [(14, 12), (0, 3)]),
        (shape(2, 1, 16), [(attention_cut.SPLIT_TOKENS - 2, 4), (3, 1)]),
    ],
)
def test_a_token_has_the_same_bits_alone_and_in_company(
    interpreted: Interpreted, like: Shape, lengths: list[tuple[int, int]]
) -> None:
    assert interpreted(triton_cases.is_same_attention_alone, like, lengths)


def test_an_operation_on_no_rows_gives_none(interpreted: Interpreted) -> None:
    assert interpreted(triton_cases.no_rows) == [
        *((0, 32), (0, 32), (0, 32), (0, 16), (0, 32)),
        *((0, 2, 32), (0, 2, 32), (0, 5)),
    ]


LARGE = Work(
    1, 1, heads=32, kv_heads=8, size=128, longest=32_768, dtype=torch.bfloat16
)  # of a model of 8B
H200_PROCESSORS = 132


def test_one_long_context_is_split_to_fill_the_device() -> None:
    cut = attention_cut.as_it_suits(LARGE, H200_PROCESSORS)

    assert cut.is_split
    assert cut.tile_tokens == 1
    assert cut.splits * LARGE.kv_heads >= H200_PROCESSORS


def test_a_prompt_that_fills_the_device_is_not_split() -> None:
    cut = attention_cut.as_it_suits(replace(LARGE, tokens=2048), H200_PROCESSORS)

    assert not cut.is_split
    assert cut.splits == 1
    assert cut.tile_tokens == attention_cut.MANY_ROWS // LARGE.group


def test_a_short_context_is_not_split() -> None:
    work = replace(LARGE, longest=attention_cut.MIN_SPLIT_TOKENS)

    assert not attention_cut.as_it_suits(work, H200_PROCESSORS).is_split


@pytest.mark.parametrize("tokens", [1, 4, 8, 100, 1500, 5000])
@pytest.mark.parametrize("heads", [4, 32, 128])
@pytest.mark.parametrize("longest", [16, 8192, 131_072])
def test_splits_have_room_for_what_they_find(tokens: int, heads: int, longest: int) -> None:
    work = replace(LARGE, tokens=tokens, heads=heads, kv_heads=4, longest=longest)

    suits = attention_cut.as_it_suits(work, H200_PROCESSORS)
    fixed = attention_cut.in_fixed_splits(work)

    assert not suits.is_split or suits.splits * tokens <= work.partial_rows
    assert fixed.splits * fixed.fixed_split >= longest
    assert fixed.tokens_at_once == 1 or fixed.tokens_at_once * fixed.splits <= work.partial_rows


def test_a_fixed_cut_does_not_depend_on_the_step() -> None:
    cuts = {
        (cut.tile, cut.tile_tokens, cut.fixed_split, cut.is_split)
        for tokens, sequences, longest in ((1, 1, 16), (64, 64, 4096), (2048, 3, 32_768))
        for cut in [
            attention_cut.in_fixed_splits(
                replace(LARGE, tokens=tokens, sequences=sequences, longest=longest)
            )
        ]
    }

    assert len(cuts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 8, 16, 40])
def test_a_tile_holds_a_whole_group(group: int, dtype: torch.dtype) -> None:
    work = replace(LARGE, heads=group, kv_heads=1, dtype=dtype)

    for cut in (attention_cut.as_it_suits(work, 16), attention_cut.in_fixed_splits(work)):
        assert cut.tile.rows >= cut.tile_tokens * group >= group
