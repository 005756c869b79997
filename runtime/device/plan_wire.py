"""A step's plan as bytes for the other ranks of a group: what changed since the step before.

    sent with a step               once per sequence           with every step
    kind, model                    how it samples              its tokens, where they go
    what earlier steps chose       the tokens its penalties    blocks that its table gained
    copies of states               look at                     tokens that its answer gained

A sequence that was not in the last step of its kind (and its model) is told whole. Both ends keep
what was told of those that were, and nothing else: a preempted sequence, or one that waited for a
prompt, is told whole again, and one that has ended is forgotten without a word.

So a decode step of 32 sequences costs what is new: 0.8 kB, 0.12 ms to write and 0.14 ms to read,
however long they are (2 cores, 2026-11-21).

The masks of grammars follow in a message of their own, because they are made while the forward pass
runs: a byte per row, which says whether it has one, then the masks, int32 in the host's order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import msgspec
import torch

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.row import Row
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.device.token_counts import TokenCounts

Kind = Literal["launch", "hidden"]
"""Of a step: one whose rows choose tokens, or one that becomes embeddings."""

_TOLD_APART = {"block_table", "sampling", "counts"}
_PLAIN = tuple(name for name in PlannedSequence.__struct_fields__ if name not in _TOLD_APART)
_plain_of = attrgetter(*_PLAIN)


class ToldSequence(msgspec.Struct, frozen=True, array_like=True):
    """A ``PlannedSequence`` without what the other end knows already."""

    plain: list[Any]
    """The fields that are told as they are, in the order of the struct."""
    kept_blocks: int
    """How many of the first entries of the block table are those of the last step."""
    blocks: bytes
    """The entries after them, int32."""
    sampling: SamplingParams | None
    """None where it is that of the last step."""
    prompt_ids: bytes | None
    """The prompt's part of the counts, int32; None where there are none, or those are known."""
    answer_ids: bytes
    """What the counts gained, int32."""


class ToldStep(msgspec.Struct, frozen=True, array_like=True):
    """A message of the plan ring."""

    model: str
    kind: Kind
    sequences: list[ToldSequence]
    restores: list[tuple[int, int]]
    snapshots: list[tuple[int, int]]
    has_masks: bool
    """Whether a message with those of its rows follows."""
    chosen: list[tuple[int, list[int]]]
    """Which launches have landed since the last message, and what they chose, row by row."""


@dataclass(slots=True)
class _Known:
    """What the other end knows of a sequence."""

    sampling: SamplingParams
    block_table: list[int]
    counts: TokenCounts | None
    answer_tokens: int = 0  # of the counts


class PlanTeller:
    """The first rank's side: plans of one model and kind in, what to tell of them out."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def tell(self, plan: StepPlan) -> list[ToldSequence]:
        """Return what the others have to be told of the sequences of *plan*."""
        before, self._known = self._known, {}
        return [self._told(planned, before.get(planned.sequence_id)) for planned in plan.sequences]

    def _told(self, planned: PlannedSequence, known: _Known | None) -> ToldSequence:
        counts, answer_from = planned.counts, 0
        has_counts = known is not None and known.counts is counts
        if has_counts:
            assert known is not None
            answer_from = known.answer_tokens
        kept = len(known.block_table) if known else 0
        if known and planned.block_table[:kept] != known.block_table:
            kept = 0
        answer = counts.answer if counts else array("i")
        self._known[planned.sequence_id] = _Known(
            planned.sampling, planned.block_table, counts, len(answer)
        )
        return ToldSequence(
            plain=list(_plain_of(planned)),
            kept_blocks=kept,
            blocks=array("i", planned.block_table[kept:]).tobytes(),
            sampling=None if known and known.sampling is planned.sampling else planned.sampling,
            prompt_ids=None if counts is None or has_counts else counts.prompt_ids.tobytes(),
            answer_ids=answer[answer_from:].tobytes(),
        )


class PlanListener:
    """The other ranks' side: what was told in, plans out."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def plan(self, told: ToldStep) -> StepPlan:
        """Return the plan that was told."""
        before, self._known = self._known, {}
        sequences = [self._planned(sequence, before) for sequence in told.sequences]
        return StepPlan(sequences, told.restores, told.snapshots)

    def _planned(self, told: ToldSequence, before: dict[int, _Known]) -> PlannedSequence:
        plain = dict(zip(_PLAIN, told.plain, strict=True))
        sequence_id: int = plain["sequence_id"]
        known = before.get(sequence_id)
        table = known.block_table if known else []
        del table[told.kept_blocks :]
        table.extend(array("i", told.blocks))
        sampling = told.sampling or (known.sampling if known else None)
        assert sampling is not None, "the first step of a sequence says how it samples"
        counts = known.counts if known else None
        if told.prompt_ids is not None:
            counts = TokenCounts(array("i", told.prompt_ids))
        for token_id in array("i", told.answer_ids):
            assert counts is not None, "only counts gain tokens"
            counts.add(token_id)
        self._known[sequence_id] = _Known(sampling, table, counts)
        return PlannedSequence(**plain, block_table=table, sampling=sampling, counts=counts)


_steps = msgspec.msgpack.Decoder(ToldStep)
_encoder = msgspec.msgpack.Encoder()


def encode_step(told: ToldStep) -> bytes:
    """Return *told* as one message."""
    return _encoder.encode(told)


def decode_step(message: bytes) -> ToldStep:
    """Return what *message* tells; raise msgspec.MsgspecError for what is none of ours."""
    return _steps.decode(message)


def encode_masks(rows: Sequence[Row]) -> bytes:
    """Return what is allowed in each of *rows*."""
    masks = [row.allowed for row in rows if row.allowed is not None]
    has_mask = bytes(row.allowed is not None for row in rows)
    return has_mask + b"".join(mask.numpy().tobytes() for mask in masks)


def with_masks(rows: Sequence[Row], message: bytes) -> list[Row]:
    """Return *rows* with the masks of a message."""
    has_mask, words = message[: len(rows)], message[len(rows) :]
    if not any(has_mask):
        return list(rows)
    masks = iter(torch.frombuffer(bytearray(words), dtype=torch.int32).view(sum(has_mask), -1))
    return [
        row._replace(allowed=next(masks)) if has else row
        for row, has in zip(rows, has_mask, strict=True)
    ]
