"""Inner dimensions are cut between blocks, into parts that differ by one block at most."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.models.checkpoints.inner_blocks import inner_block, inner_range
from cortex.models.checkpoints.tensors import TensorInfo
from cortex.models.parallel import Cut, Group

BLOCKS = st.sampled_from((1, 32, 128, 256))
RANKS = st.integers(1, 16)


def parts(size: int, block: int, ranks: int) -> list[tuple[int, int]]:
    return [inner_range(size, block, rank, ranks) for rank in range(ranks)]


@given(BLOCKS.filter(lambda block: block > 1), RANKS, st.integers(0, 200))
def test_ranks_hold_whole_blocks_side_by_side_the_first_at_most_one_more(
    block: int, ranks: int, more: int
) -> None:
    size = (ranks + more) * block

    found = parts(size, block, ranks)

    assert [0, *(end for _, end in found)] == [*(first for first, _ in found), size]
    held = [(end - first) // block for first, end in found]
    assert [(end - first) % block for first, end in found] == [0] * ranks
    assert held == sorted(held, reverse=True)
    assert held[0] - held[-1] <= 1


@given(BLOCKS, RANKS, st.integers(1, 5000))
def test_what_divides_evenly_into_whole_blocks_stays_even(
    block: int, ranks: int, each: int
) -> None:
    size = each * block * ranks

    cuts = [Group(rank, ranks, block=block).inner(size) for rank in range(ranks)]

    assert cuts == [Group(rank, ranks).share(size) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("size", "block", "ranks", "held"),
    [
        (768, 256, 2, [512, 256]),
        (18944, 256, 4, [4864, 4864, 4608, 4608]),
        (768, 128, 4, [256, 256, 128, 128]),
        (768, 256, 4, [192] * 4),  # of what is stored in such blocks the load refuses it
        (90, 32, 2, [45, 45]),  # no number of blocks: it stays dense
        (768, 256, 1, [768]),
    ],
)
def test_known_models_are_cut_like_this(size: int, block: int, ranks: int, held: list[int]) -> None:
    assert [end - first for first, end in parts(size, block, ranks)] == held
    assert Group(0, ranks, block=block).inner(size) == Cut(size, ((0, held[0]),))


@pytest.mark.parametrize(("size", "block", "ranks"), [(97, 1, 2), (97, 32, 2), (256, 256, 3)])
def test_what_has_too_few_blocks_and_odd_elements_is_refused(
    size: int, block: int, ranks: int
) -> None:
    with pytest.raises(ValueError, match=rf"{size} does not divide among {ranks} ranks"):
        inner_range(size, block, 0, ranks)


def holding(file_format: str, **kinds: str) -> Checkpoint:
    """A checkpoint with tensors of such types; ``__`` in a name is a dot."""
    names = {name.replace("__", "."): kind for name, kind in kinds.items()}
    tensors = {name: TensorInfo(name, (1,), kind, Path(), 0, 0) for name, kind in names.items()}
    return Checkpoint(Path("m"), file_format, {}, {}, tensors)


@pytest.mark.parametrize(
    ("checkpoint", "quant", "block"),
    [
        (
            holding("gguf", blk__0__ffn_down__weight="Q4_K", blk__1__ffn_down__weight="Q8_0"),
            "",
            256,
        ),
        (holding("gguf", blk__0__ffn_down_exps__weight="Q5_0"), "", 32),
        (holding("gguf", blk__0__ffn_down_shexp__weight="Q6_K"), "", 256),
        (holding("gguf", blk__0__ffn_down__weight="F16", output__weight="Q6_K"), "", 1),
        (holding("gguf", blk__0__attn_output__weight="Q6_K"), "", 1),
        (holding("safetensors", model__layers__0__mlp__down_proj__weight="BF16"), "", 1),
        (holding("safetensors", model__layers__0__mlp__down_proj__weight="BF16"), "q4_0", 32),
        (holding("safetensors", model__layers__0__mlp__experts__down_proj="BF16"), "fp8", 128),
        (holding("safetensors", model__layers__0__mlp__down_proj__weight="F8_E4M3"), "", 128),
    ],
)
def test_a_block_is_the_largest_of_what_leads_back_from_inner_dimensions(
    checkpoint: Checkpoint, quant: str, block: int
) -> None:
    assert inner_block(checkpoint, quant or None) == block
