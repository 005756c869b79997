"""One generation or embedding: the tokens it knows, and how many the KV cache has seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from cortex.ipc.messages import SamplingParams
from cortex.ipc.ring import Flag
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.reasoning_block import ReasoningBlock

NO_ANSWER = SamplingParams(temperature=0.0, max_tokens=0, seed=0)
"""Of an embedding, which ends when its prompt is computed."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known, tokens computed; a preempted sequence forgets the second, never the first."""

    id: int
    tokens: list[int]  # the prompt, then what was generated
    sampling: SamplingParams
    pooling: Pooling | None = None  # of an embedding
    prompt_tokens: int = field(init=False)
    reasoning: ReasoningBlock | None = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        budget = self.sampling.reasoning_budget
        self.reasoning = ReasoningBlock(budget) if budget else None

    @property
    def remaining(self) -> int:
        """Tokens known that are not computed: 1 while it only decodes, never 0."""
        return len(self.tokens) - self.computed

    @property
    def forced(self) -> int | None:
        """The token that has to come next; None where the model chooses."""
        return self.reasoning.forced if self.reasoning else None

    def append(self, token_id: int, limit_tokens: int) -> Flag:
        """Add a generated token; return its record's flags, with a finish where it is the last."""
        self.tokens.append(token_id)
        if self.reasoning:
            self.reasoning.add(token_id)
        if token_id in self.sampling.stop_token_ids:
            return Flag.TOKEN | Flag.STOP
        generated = len(self.tokens) - self.prompt_tokens
        if generated >= self.sampling.max_tokens or len(self.tokens) >= limit_tokens:
            return Flag.TOKEN | Flag.LENGTH
        return Flag.TOKEN
