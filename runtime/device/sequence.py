"""One generation: the tokens it knows, and how many of them the KV cache has seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from cortex.ipc.messages import SamplingParams
from cortex.ipc.ring import Flag


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known, tokens computed; a preempted sequence forgets the second, never the first."""

    id: int
    tokens: list[int]  # the prompt, then what was generated
    sampling: SamplingParams
    prompt_tokens: int = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens known that are not computed: 1 while it only decodes, never 0."""
        return len(self.tokens) - self.computed

    def append(self, token_id: int, limit_tokens: int) -> Flag:
        """Add a generated token; return its record's flags, with a finish where it is the last."""
        self.tokens.append(token_id)
        if token_id in self.sampling.stop_token_ids:
            return Flag.TOKEN | Flag.STOP
        generated = len(self.tokens) - self.prompt_tokens
        if generated >= self.sampling.max_tokens or len(self.tokens) >= limit_tokens:
            return Flag.TOKEN | Flag.LENGTH
        return Flag.TOKEN
