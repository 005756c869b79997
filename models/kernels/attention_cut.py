"""How ``triton_attention`` cuts a step into programs; arithmetic of shapes, nothing of the device.

    as it suits      whole contexts where there are tiles enough to fill the device, else so many
                     splits as fill it, their length from the context in the kernel
    in fixed splits  splits of SPLIT_TOKENS from position 0 on and one tile shape, whatever the step

In the second way a row's sums are taken over the same keys in the same order whatever else is in
the step, however the prompt was chunked, and wherever in its tile the row lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPLIT_TOKENS = 1024
"""Length of a fixed split: short enough to fill a device with one long context, long enough that
merging costs a hundredth of reading the keys."""

MIN_SPLIT_TOKENS = 128
"""A shorter split is not worth a program and a place to merge."""

MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 4
"""Programs that keep a multiprocessor's memory busy; where there are fewer tiles, we split."""

PARTIAL_FLOATS = 1 << 23
"""Room for the results of splits: 32 MiB, the same in every step that splits, so that a small
measured step tells what a large one takes."""

FEW_ROWS, MANY_ROWS = 16, 64  # of a tile: single tokens, prompts


@dataclass(frozen=True, slots=True)
class Work:
    """One call of attention, by its shapes."""

    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    size: int
    longest: int  # positions that a block table has room for
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @property
    def partial_rows(self) -> int:
        """Results of splits, each with its log-sum-exp, that there is room for, of all heads."""
        return PARTIAL_FLOATS // (self.heads * (self.size + 1))


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds: *rows* of queries, *keys* at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a step is cut: tiles of *tile_tokens*, *splits* of every context.

    *fixed_split* is a split's length, 0 where the kernel shares a context among the splits. No more
    than *tokens_at_once* are computed by one launch.
    """

    tile: Tile
    tile_tokens: int
    splits: int
    fixed_split: int
    tokens_at_once: int
    is_split: bool


def as_it_suits(work: Work, processors: int) -> Cut:
    """Fill a device of so many multiprocessors."""
    per_sequence = -(-work.tokens // work.sequences)
    tile = tile_of(work, FEW_ROWS if per_sequence * work.group <= FEW_ROWS else MANY_ROWS)
    tile_tokens = 1 if per_sequence == 1 else tile.rows // work.group
    busy = max(1, work.tokens // tile_tokens) * work.kv_heads
    splits = min(
        PROGRAMS_PER_PROCESSOR * processors // busy,
        MAX_SPLITS,
        -(-work.longest // MIN_SPLIT_TOKENS),
        work.partial_rows // work.tokens,
    )
    return Cut(
        tile,
        tile_tokens,
        splits=max(splits, 1),
        fixed_split=0,
        tokens_at_once=work.tokens,
        is_split=splits > 1,
    )


def in_fixed_splits(work: Work) -> Cut:
    """Split every context alike, so many tokens at a time as there is room to merge."""
    tile = tile_of(work, MANY_ROWS)
    splits = -(-work.longest // SPLIT_TOKENS)
    return Cut(
        tile,
        tile.rows // work.group,
        splits,
        fixed_split=SPLIT_TOKENS,
        tokens_at_once=max(work.partial_rows // splits, 1),
        is_split=True,
    )


def tile_of(work: Work, rows: int) -> Tile:
    """Return the tile that takes *rows*, or the group's if that is more, in 99 KiB (RTX 30, 40).

    Reckoned, and held to by what the compiler reports; not measured on a device yet.
    """
    group = 1 << (work.group - 1).bit_length()
    if work.dtype == torch.float32:
        return Tile(max(group, FEW_ROWS), 32 if work.size <= 128 else 16, warps=4, stages=1)
    rows = max(group, rows)
    if work.size <= 128:
        return Tile(rows, 64, warps=4, stages=2)
    return Tile(rows, 32, warps=4 if rows == FEW_ROWS else 8, stages=2)
