"""What a step computes: plain data, so that the ranks of a group can be sent it. No torch."""

from __future__ import annotations

import msgspec

from cortex.ipc.messages import SamplingParams
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.token_counts import TokenCounts


class PlannedSequence(msgspec.Struct, frozen=True):
    """What one sequence brings to a step: tokens at positions from ``first_position`` on.

    The last ``drafts`` of them are guesses of what comes after those known.
    """

    sequence_id: int
    token_ids: list[int]
    first_position: int
    block_table: list[int]
    is_last: bool
    """All tokens known are computed then."""
    sampling: SamplingParams
    pooling: Pooling | None = None
    """How an embedding makes one vector of all its tokens; None for a generation."""
    counts: TokenCounts | None = None
    """Of all tokens known, where penalties need them; a rank that is sent a plan keeps its own."""
    forced: int | None = None
    """The token that comes next whatever the logits say."""
    drafts: int = 0
    state_slot: int = 0
    """Where the recurrent state lies, of a model that has one."""
    scored: list[int] = []
    """Tokens of the prompt whose log probabilities are asked for: those after the tokens whose rows
    of logits are the first ones."""

    @property
    def samples(self) -> bool:
        """Whether the logits of the last of these tokens choose the next one."""
        return self.is_last and self.pooling is None

    @property
    def rows(self) -> int:
        """How many rows of logits it wants, of its last tokens."""
        return len(self.scored) + self.choices

    @property
    def choices(self) -> int:
        """How many of them, the last ones, choose a token."""
        return 1 + self.drafts if self.samples else 0

    @property
    def drafted(self) -> list[int]:
        """The guesses."""
        return self.token_ids[len(self.token_ids) - self.drafts :]

    @property
    def end_position(self) -> int:
        """The position after the last of these tokens."""
        return self.first_position + len(self.token_ids)

    @property
    def known_position(self) -> int:
        """The position after those known: that of the first token sampled from them."""
        return self.end_position - self.drafts


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass, and whose next tokens are sampled from it."""

    sequences: list[PlannedSequence]
    restores: list[tuple[int, int]] = []
    """Recurrent states to copy from the first slot to the second before the step."""
    snapshots: list[tuple[int, int]] = []
    """The same after it."""

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(planned.token_ids) for planned in self.sequences)

    @property
    def generations(self) -> StepPlan:
        """The part of it that may be given tokens; only of these are states copied."""
        generations = [planned for planned in self.sequences if planned.pooling is None]
        return StepPlan(generations, self.restores, self.snapshots)

    @property
    def embeddings(self) -> StepPlan:
        """The part of it that becomes vectors."""
        return StepPlan([planned for planned in self.sequences if planned.pooling is not None])

    @property
    def sampled(self) -> list[PlannedSequence]:
        """The sequences that want logits, in the order of their rows."""
        return [planned for planned in self.sequences if planned.rows]

    @property
    def rows(self) -> int:
        """How many rows of logits it has."""
        return sum(planned.rows for planned in self.sequences)
