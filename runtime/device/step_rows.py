"""How the rows of a step are chosen from, in the order of its logits.

The rows that tell the log probabilities of a prompt have the prompt's own tokens put in.

Where grammars say what may be chosen, that is computed while the forward pass runs: the rows are
made when the sampler first looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import overload

import msgspec
from torch import Tensor

from cortex.runtime.device.grammar import Grammars, GrammarState
from cortex.runtime.device.row import Row
from cortex.runtime.device.sequence import NO_ANSWER
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan


def rows_of(
    plan: StepPlan, grammar_of: Callable[[int], GrammarState | None], grammars: Grammars
) -> Sequence[Row]:
    """Return the rows of *plan*; *grammar_of* says where a sequence stands in its grammar."""
    sampled = [
        (planned, grammar_of(planned.sequence_id) if planned.samples else None)
        for planned in plan.sampled
    ]
    asked = [(state, planned.drafted) for planned, state in sampled if state]
    if not asked:
        return rows_without_masks(plan)
    masks = grammars.masks(asked)

    def make() -> list[Row]:
        found = iter(masks.result())
        return [
            row
            for planned, state in sampled
            for row in _rows(planned, next(found) if state else [None] * planned.choices)
        ]

    return LateRows(make)


def rows_without_masks(plan: StepPlan) -> list[Row]:
    """Return the rows of *plan* as if no sequence had a grammar."""
    return [row for planned in plan.sampled for row in _rows(planned, [None] * planned.choices)]


def _rows(planned: PlannedSequence, allowed: Sequence[Tensor | None]) -> list[Row]:
    chosen = [
        Row(
            planned.sampling,
            planned.known_position + index,
            planned.counts,
            planned.forced,
            mask,
        )
        for index, mask in enumerate(allowed)
    ]
    return [*_scored(planned), *chosen] if planned.scored else chosen


def _scored(planned: PlannedSequence) -> list[Row]:
    asked = msgspec.structs.replace(NO_ANSWER, top_logprobs=planned.sampling.prompt_logprobs)
    return [Row(asked, position=0, forced=token_id) for token_id in planned.scored]


class LateRows(Sequence[Row]):
    """Rows with masks, which *make* makes, or waits for, once somebody looks."""

    def __init__(self, make: Callable[[], list[Row]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> list[Row]:
        return self._make()

    def make_now(self) -> None:
        """Make them, unless somebody has looked already."""
        self.__len__()

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._made[index]
